"""Configurations and processors of tiny vision-language models: a function of each per architecture."""

from typing import Any

from tests.e2e.architectures import HEADS, LINEAR_ATTENTION

SIDE = 56
PIECES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
ViT = {
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 14,
    "initializer_range": 0.15,
}
SPECIAL = (
    *("<s>", "</s>", "<image>", "<pad>"),
    *("<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("\n", "\n\n", "\n\n\n", "\n\n\n\n"),
)
VOCABULARY = 256 + len(SPECIAL)


def byte_tokenizer(framed: bool, **more: Any) -> Any:
    """A byte tokenizer whose special tokens come last; `framed` texts begin with <s> and end with </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {char: i for i, char in enumerate((*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(name, vocab[name]) for name in SPECIAL[:2]]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=64 if framed else 4096,
        **more,
    )


def clip_processor(tokenizer: Any) -> Any:
    """Of CLIP; the tokenizer ends texts, as CLIP's does."""
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
    )


def clip_options(ids: dict[str, int]) -> dict[str, Any]:
    """Two towers of different width."""
    text = {
        "projection_dim": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return {
        "text_config": text | {"max_position_embeddings": 64, "initializer_range": 0.15},
        "vision_config": ViT,
        "projection_dim": 64,
    }


def language(ids: dict[str, int], model_type: str, **more: Any) -> dict[str, Any]:
    """A language model's part of a configuration."""
    special = {"vocab_size": VOCABULARY, "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    return HEADS | special | {"pad_token_id": ids["<pad>"], "model_type": model_type} | more


def llava_processor(tokenizer: Any) -> Any:
    """Of LLaVA; the first of the vision tower's tokens is left out."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=clip_processor(tokenizer).image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_options(ids: dict[str, int]) -> dict[str, Any]:
    """The last layer but one of a CLIP vision model, and a Llama."""
    return {
        "vision_config": ViT | {"model_type": "clip_vision_model"},
        "text_config": language(ids, "llama"),
        "image_token_index": ids["<image>"],
        "vision_feature_layer": -2,
    }


def llava_next_processor(tokenizer: Any) -> Any:
    """Of LLaVA-NeXT, which also splits an image into tiles."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    crop = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop, image_grid_pinpoints=PIECES)
    return LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava_next_options(ids: dict[str, int]) -> dict[str, Any]:
    """As LLaVA, with the sizes of the tiles."""
    return llava_options(ids) | {"image_grid_pinpoints": PIECES}


def mistral_processor(tokenizer: Any) -> Any:
    """Of Mistral 3, whose images have rows of tokens."""
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    images = PixtralImageProcessorPil(size={"longest_edge": SIDE}, patch_size={"height": 14, "width": 14})
    named = {"image_token": "<image>", "image_break_token": "<start_of_image>", "image_end_token": "<end_of_image>"}
    return PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2, **named)


def mistral_options(ids: dict[str, int]) -> dict[str, Any]:
    """A Pixtral vision model, four of whose tokens become one."""
    return {
        "vision_config": ViT | {"model_type": "pixtral", "head_dim": 32},
        "text_config": language(ids, "mistral"),
        "image_token_index": ids["<image>"],
        "tie_word_embeddings": False,
    }


def onevision_processor(tokenizer: Any) -> Any:
    """Of LLaVA-OneVision, which splits an image into tiles and keeps all of its tokens."""
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    size = {"height": SIDE, "width": SIDE}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PIECES)
    return LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        video_token="<|video_pad|>",
    )


def onevision_options(ids: dict[str, int]) -> dict[str, Any]:
    """A SigLIP vision model and a Qwen2."""
    return {
        "vision_config": ViT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "text_config": language(ids, "qwen2"),
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<|video_pad|>"],
        "image_grid_pinpoints": PIECES,
    }


def internvl_processor(tokenizer: Any) -> Any:
    """Of InternVL: no image is split into tiles."""
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size = {"height": SIDE, "width": SIDE}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=False)
    named = {"start_image_token": "<start_of_image>", "end_image_token": "<end_of_image>"}
    named |= {"context_image_token": "<image_soft_token>", "video_token": "<|video_pad|>"}
    tokenizer = byte_tokenizer(framed=False, extra_special_tokens=named)
    return InternVLProcessor(images, tokenizer, InternVLVideoProcessor(size=size), image_seq_length=4)


def internvl_options(ids: dict[str, int]) -> dict[str, Any]:
    """A vision model of its own, four of whose tokens become one."""
    sizes = {"image_size": [SIDE, SIDE], "patch_size": [14, 14]}
    return {
        "vision_config": ViT | sizes,
        "text_config": language(ids, "qwen2"),
        "image_token_id": ids["<image_soft_token>"],
        "image_seq_length": 4,
    }


def idefics_processor(tokenizer: Any) -> Any:
    """Of Idefics 3: no image is split into tiles."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=4)


def idefics_options(ids: dict[str, int]) -> dict[str, Any]:
    """A SigLIP vision model, four of whose tokens become one."""
    return {
        "vision_config": ViT,
        "text_config": language(ids, "llama"),
        "image_token_id": ids["<image>"],
        "scale_factor": 2,
        "pad_token_id": ids["<pad>"],
    }


def smolvlm_processor(tokenizer: Any) -> Any:
    """Of SmolVLM 2, which also takes videos: no image is split into tiles."""
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    sizes = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    images = SmolVLMImageProcessorPil(**sizes, do_image_splitting=False)
    video = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": SIDE}}
    return SmolVLMProcessor(images, tokenizer, SmolVLMVideoProcessor(**sizes, video_sampling=video), image_seq_len=4)


def gemma_processor(tokenizer: Any) -> Any:
    """Of Gemma 3."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_pan_and_scan=False)
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return Gemma3Processor(images, byte_tokenizer(framed=False, extra_special_tokens=named), image_seq_length=4)


def gemma_options(ids: dict[str, int]) -> dict[str, Any]:
    """A SigLIP vision model, averaged over squares of four tokens."""
    return {
        "vision_config": ViT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "text_config": language(ids, "gemma3_text", query_pre_attn_scalar=32, sliding_window=16),
        "mm_tokens_per_image": 4,
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
    }


QWEN_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
)


def qwen_processor(tokenizer: Any) -> Any:
    """Of Qwen2-VL and Qwen2.5-VL, which take images of any size."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    sizes = {"size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=QWEN_TEMPLATE
    )


def qwen_options(ids: dict[str, int], model_type: str, vision: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions of time, height and width."""
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    usual = {"depth": 3, "num_heads": 3, "patch_size": 14, "spatial_merge_size": 2, "initializer_range": 0.15}
    return {
        "vision_config": usual | vision,
        "text_config": language(ids, f"{model_type}_text", rope_parameters=rope),
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def qwen2_options(ids: dict[str, int]) -> dict[str, Any]:
    """Of Qwen2-VL."""
    return qwen_options(ids, "qwen2_vl", {"embed_dim": 96, "hidden_size": 128, "mlp_ratio": 2})


def qwen25_options(ids: dict[str, int]) -> dict[str, Any]:
    """Of Qwen2.5-VL, some of whose layers attend within windows of the image."""
    vision = {"hidden_size": 96, "out_hidden_size": 128, "intermediate_size": 224, "window_size": 28}
    return qwen_options(ids, "qwen2_5_vl", vision | {"fullatt_block_indexes": [2]})


def qwen3_processor(tokenizer: Any) -> Any:
    """Of Qwen3-VL and Qwen3.5."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = {"size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes, patch_size=14),
        tokenizer,
        Qwen3VLVideoProcessor(**sizes, patch_size=14),
        chat_template=QWEN_TEMPLATE,
    )


def qwen3_options(ids: dict[str, int]) -> dict[str, Any]:
    """Of Qwen3-VL, which adds outputs of earlier vision layers after its first language layers."""
    vision = {"hidden_size": 96, "out_hidden_size": 128, "intermediate_size": 448, "num_position_embeddings": 16}
    return qwen_options(ids, "qwen3_vl", vision | {"depth": 4, "deepstack_visual_indexes": [0, 2]})


def qwen35_options(ids: dict[str, int]) -> dict[str, Any]:
    """Of Qwen3.5, whose attention layers rotate a quarter of their queries and keys."""
    vision = {"hidden_size": 96, "out_hidden_size": 128, "intermediate_size": 448, "num_position_embeddings": 16}
    options = qwen_options(ids, "qwen3_5", vision)
    sections = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    text = options["text_config"]
    return options | {"text_config": text | LINEAR_ATTENTION | {"rope_parameters": text["rope_parameters"] | sections}}


def siglip_processor(tokenizer: Any) -> Any:
    """Of SigLIP, whose texts are filled up to one length."""
    from transformers import SiglipProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer.model_input_names = ["input_ids"]
    return SiglipProcessor(SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)


def siglip_options(ids: dict[str, int]) -> dict[str, Any]:
    """Both towers of one width, as in all of them."""
    text = {"vocab_size": VOCABULARY, "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    text |= {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 3}
    return {
        "text_config": text | {"max_position_embeddings": 64, "pad_token_id": ids["</s>"], "projection_size": 96},
        "vision_config": ViT,
    }

"""One tiny random vision-language model per architecture, with its processor, images and captions."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.e2e import vision_parts as parts
from tests.e2e.architectures import BF16

COLOURS = ("red", "green", "blue", "yellow", "white", "grey")
RGB = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 50, 220),
    "yellow": (230, 220, 40),
    "white": (250, 250, 250),
    "grey": (128, 128, 128),
}


@dataclass(frozen=True)
class VisionModel:
    """One row.

    Attributes:
        name: what people call the models.
        config: class of transformers.
        options: its arguments, given the ids of special tokens by name.
        processor: makes the processor of a tokenizer.
        published: prefix of tensor names that transformers writes -> the prefix in published checkpoints.
        compares: whether it embeds images and texts, instead of generating text about images.
        note: its particularity, for docs/models.md.
        like_transformers: whether vLLM's probabilities of the dense model are those of transformers; where they are
            not, factored models are compared with the reconstructed dense model in vLLM.
        core: whether `make test` tests it; `make test-all` tests them all.
        projector: whether the projector between its towers may be factored.
        engine: options of vLLM's engine.
    """

    name: str
    config: str
    options: Callable[[dict[str, int]], dict[str, Any]]
    processor: Callable[[Any], Any]
    published: dict[str, str] = field(default_factory=dict)
    compares: bool = False
    note: str = ""
    like_transformers: bool = True
    core: bool = False
    projector: bool = False
    engine: dict[str, Any] = field(default_factory=dict)


VISION_MODEL = {"vision_tower.": "vision_tower.vision_model."}
VISION_MODELS = (
    VisionModel(
        "CLIP",
        "CLIPConfig",
        parts.clip_options,
        parts.clip_processor,
        compares=True,
        note="embeds images and texts",
        core=True,
    ),
    VisionModel(
        "SigLIP",
        "SiglipConfig",
        parts.siglip_options,
        parts.siglip_processor,
        compares=True,
        note="embeds images and texts",
    ),
    VisionModel(
        "LLaVA 1.5",
        "LlavaConfig",
        parts.llava_options,
        parts.llava_processor,
        VISION_MODEL,
        note="reads the last vision layer but one",
        core=True,
        projector=True,
    ),
    VisionModel(
        "LLaVA-NeXT, 1.6",
        "LlavaNextConfig",
        parts.llava_next_options,
        parts.llava_next_processor,
        VISION_MODEL,
        note="images in pieces",
        projector=True,
    ),
    VisionModel(
        "LLaVA-OneVision", "LlavaOnevisionConfig", parts.onevision_options, parts.onevision_processor, VISION_MODEL
    ),
    VisionModel(
        "InternVL 3",
        "InternVLConfig",
        parts.internvl_options,
        parts.internvl_processor,
        note="vLLM builds its vision attention from other linear layers",
    ),
    VisionModel(
        "Mistral Small 3.1",
        "Mistral3Config",
        parts.mistral_options,
        parts.mistral_processor,
        note="rows of image tokens",
    ),
    VisionModel(
        "Qwen2-VL",
        "Qwen2VLConfig",
        parts.qwen2_options,
        parts.qwen_processor,
        note="images of any size",
        projector=True,
    ),
    VisionModel(
        "Qwen2.5-VL",
        "Qwen2_5_VLConfig",
        parts.qwen25_options,
        parts.qwen_processor,
        note="images of any size, in windows",
        projector=True,
    ),
    VisionModel(
        "Qwen3-VL",
        "Qwen3VLConfig",
        parts.qwen3_options,
        parts.qwen3_processor,
        note="adds features of earlier vision layers between its language layers",
        like_transformers=False,
    ),
    VisionModel(
        "Qwen3.5",
        "Qwen3_5Config",
        parts.qwen35_options,
        parts.qwen3_processor,
        note="linear and full attention layers",
        engine=BF16,
    ),
    VisionModel("Idefics 3, SmolVLM", "Idefics3Config", parts.idefics_options, parts.idefics_processor, projector=True),
    VisionModel("SmolVLM 2", "SmolVLMConfig", parts.idefics_options, parts.smolvlm_processor, projector=True),
    VisionModel(
        "Gemma 3",
        "Gemma3Config",
        parts.gemma_options,
        parts.gemma_processor,
        VISION_MODEL,
        note="vLLM's CPU attention is causal between an image's tokens",
        like_transformers=False,
    ),
)


def save_pairs(folder: Path, count: int, seed: int = 0) -> Path:
    """Images of two coloured halves and noise, with captions.jsonl."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        left, right = (COLOURS[int(i)] for i in torch.randint(len(COLOURS), (2,), generator=generator))
        pixels = torch.empty(parts.SIDE, parts.SIDE, 3)
        pixels[:, : parts.SIDE // 2], pixels[:, parts.SIDE // 2 :] = (
            torch.tensor(RGB[c], dtype=torch.float32) for c in (left, right)
        )
        pixels = (pixels + 25 * torch.randn(pixels.shape, generator=generator)).clamp(0, 255)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": f"{left} beside {right}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _renamed(name: str, published: dict[str, str]) -> str:
    for old, new in published.items():
        name = name.replace(old, new, 1) if name.startswith(old) else name
    return name


def save_vision_model(row: VisionModel, folder: Path) -> Path:
    """A random model in float32 with its processor."""
    import transformers

    from pgsvd_vllm.offline.model.source import KINDS

    tokenizer = parts.byte_tokenizer(framed=row.compares)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in parts.SPECIAL}
    torch.manual_seed(0)
    config = getattr(transformers, row.config)(**row.options(ids))
    auto_class = KINDS[2 if row.compares else 1][1]
    model = auto_class.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # zeros, until it is trained
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    row.processor(tokenizer).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {_renamed(name, row.published): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder

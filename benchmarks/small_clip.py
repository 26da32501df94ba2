"""A small real CLIP, trained here because no package has one's weights.

    python benchmarks/small_clip.py [--images ZIP]

Its data are scikit-learn's handwritten digits and optionally a ZIP of small photographs with a labels.json (classes,
images: file and label). The model is kept in the user's cache. Run the script to train it and print its folder.
"""

import argparse
import io
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pgsvd_vllm.offline.model.device import gemm_dtype, pick_device
from tests.support.reference_model import cache_folder

SIDE, PATCH = 32, 4
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = {
    "digit": ("a handwritten {}", "the digit {}", "a small picture of the number {}"),
    "photo": ("a photo of a {}", "a small picture of a {}", "this is a {}"),
}
TESTED = {"digit": 500, "photo": 300}
STEPS, BATCH, RATE = 1500, 128, 1e-3
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
WIDTH = 128
LONGEST = 16
SEED = 0


@dataclass(frozen=True)
class Pictures:
    """Images with classes.

    Attributes:
        pixels: uint8 [images, SIDE, SIDE, 3].
        labels: int64 [images], places in `classes`.
        classes: (kind, name), a kind of TEMPLATES.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: list[tuple[str, str]]

    def captions(self, label: int) -> list[str]:
        """Captions of an image of a class."""
        kind, name = self.classes[label]
        return [template.format(name) for template in TEMPLATES[kind]]

    def part(self, rows: torch.Tensor) -> "Pictures":
        """A subset of the images."""
        return Pictures(self.pixels[rows], self.labels[rows], self.classes)


def load_pictures(photographs: Path | None) -> tuple[Pictures, Pictures]:
    """The training images and the test images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    pixels = F.interpolate(images, (SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
    parts = [("digit", pixels[:, 0, :, :, None].expand(-1, -1, -1, 3), torch.tensor(digits.target), DIGITS)]
    if photographs is not None:
        with zipfile.ZipFile(photographs) as archive:
            listed = json.loads(archive.read("labels.json"))
            opened = [Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGB") for row in listed["images"]]
        photos = torch.stack([torch.tensor(list(image.getdata())).view(SIDE, SIDE, 3) for image in opened])
        names = listed["classes"]
        labels = [
            row["label"] if isinstance(row["label"], int) else names.index(row["label"]) for row in listed["images"]
        ]
        parts.append(("photo", photos.to(torch.uint8), torch.tensor(labels), tuple(names)))
    classes: list[tuple[str, str]] = []
    trained, tested = [], []
    for kind, images, labels, names in parts:
        labels = labels.long() + len(classes)
        classes += [(kind, name) for name in names]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
        cut = TESTED[kind]
        tested.append((images[order[:cut]], labels[order[:cut]]))
        trained.append((images[order[cut:]], labels[order[cut:]]))
    both = [
        Pictures(torch.cat([p for p, _ in rows]), torch.cat([y for _, y in rows]), classes)
        for rows in (trained, tested)
    ]
    return both[0], both[1]


def save_processor(folder: Path, texts: list[str]) -> Any:
    """A tokenizer of whole words and the image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    vocab = {word: i for i, word in enumerate([*words, "<unk>", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(name, vocab[name]) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=LONGEST,
    )
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = CLIPProcessor(images, fast)
    processor.save_pretrained(folder)
    return processor


def moved(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to three pixels in both directions, [images, 3, SIDE, SIDE], not normalised."""
    wide = F.pad(pixels.permute(0, 3, 1, 2).float() / 255, (3, 3, 3, 3))
    places = torch.randint(7, (len(pixels), 2), generator=generator).tolist()
    return torch.stack([w[:, y : y + SIDE, x : x + SIDE] for w, (y, x) in zip(wide, places, strict=True)])


def train(folder: Path, pictures: Pictures) -> None:
    """Write the trained model into a folder."""
    from transformers import CLIPConfig, CLIPModel

    captions = [pictures.captions(label) for label in range(len(pictures.classes))]
    processor = save_processor(folder, [text for row in captions for text in row])
    tokenizer = processor.tokenizer
    special = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    special |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(SEED)
    config = CLIPConfig(
        text_config=TEXT | special | {"max_position_embeddings": LONGEST, "projection_dim": WIDTH},
        vision_config=VISION | {"image_size": SIDE, "patch_size": PATCH, "projection_dim": WIDTH},
        projection_dim=WIDTH,
    )
    device = pick_device("auto")
    model = CLIPModel(config).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    generator = torch.Generator().manual_seed(SEED)
    dtype = gemm_dtype(device, torch.bfloat16)
    photo = torch.tensor([kind == "photo" for kind, _ in pictures.classes])
    with tqdm(range(STEPS), desc="train") as bar:
        for _ in bar:
            rows = torch.randint(len(pictures.pixels), (BATCH,), generator=generator)
            labels, pixels = pictures.labels[rows], moved(pictures.pixels[rows], generator)
            flipped = photo[labels] & (torch.rand(BATCH, generator=generator) < 0.5)
            pixels[flipped] = pixels[flipped].flip(-1)
            picked = torch.randint(3, (BATCH,), generator=generator).tolist()
            texts = [captions[y][i] for y, i in zip(labels.tolist(), picked, strict=True)]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                ids = tokenizer(texts, padding=True, return_tensors="pt").to(device)
                logits = model(pixel_values=((pixels - mean) / std).to(device), **ids).logits_per_text.float()
            # Several captions of a batch fit an image.
            same = (labels[:, None] == labels).float()
            target = (same / same.sum(1, keepdim=True)).to(device)
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.eval().save_pretrained(folder)


def small_clip(photographs: Path | None) -> Path:
    """The model's folder, trained on the first call (about ten minutes on two cores)."""
    target = cache_folder() / ("small-clip-digits" if photographs is None else "small-clip-photos")
    if not target.is_dir():
        unfinished = target.with_name(f"{target.name}.{SEED}.writing")
        unfinished.mkdir(parents=True, exist_ok=True)
        train(unfinished, load_pictures(photographs)[0])
        unfinished.rename(target)
    return target


def save_pairs(folder: Path, pictures: Pictures) -> Path:
    """The images with captions.jsonl, to calibrate on."""
    folder.mkdir(parents=True)
    rows = []
    for number, (pixels, label) in enumerate(zip(pictures.pixels, pictures.labels.tolist(), strict=True)):
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        texts = pictures.captions(label)
        rows.append(json.dumps({"image": f"{number}.png", "text": texts[number % len(texts)]}))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@torch.inference_mode()
def class_logits(model: Any, processor: Any, pictures: Pictures) -> torch.Tensor:
    """Zero-shot class logits of every image, [images, classes].

    Captions of a class are averaged, as is usual (CLIP, arXiv 2103.00020, section 3.1.4).
    """
    texts = []
    for label in range(len(pictures.classes)):
        ids = processor.tokenizer(pictures.captions(label), padding=True, return_tensors="pt")
        texts.append(F.normalize(model.get_text_features(**ids).pooler_output.float(), dim=-1).mean(0))
    images = [Image.fromarray(pixels.numpy()) for pixels in pictures.pixels]
    vectors = []
    for start in range(0, len(images), BATCH):
        inputs = processor.image_processor(images[start : start + BATCH], return_tensors="pt")
        vectors.append(F.normalize(model.get_image_features(**inputs).pooler_output.float(), dim=-1))
    return torch.cat(vectors) @ F.normalize(torch.stack(texts), dim=-1).T * model.logit_scale.exp()


def accuracy(logits: torch.Tensor, pictures: Pictures) -> dict[str, float]:
    """Share of images whose own class is the most likely; by kind, and of all."""
    right = logits.argmax(1) == pictures.labels
    kinds = [pictures.classes[label][0] for label in pictures.labels.tolist()]
    found = {
        kind: float(right[torch.tensor([k == kind for k in kinds])].float().mean()) for kind in dict.fromkeys(kinds)
    }
    return found | {"all": float(right.float().mean())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="ZIP")
    print(small_clip(parser.parse_args().images))

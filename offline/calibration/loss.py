"""The loss whose gradients measure sensitivities, with labels drawn from the model's own predictions.

For a language or vision-language model it is the cross entropy of every next token. For a dual encoder it is the
contrastive loss over all images and texts of the calibration set: softmax cross entropy in both directions (CLIP), or
binary cross entropy of every pair (SigLIP). Drawn labels make the gradient moments the Fisher information.
"""

import hashlib
import itertools

import torch
import torch.nn.functional as F

from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.linalg import overflow
from pgsvd_vllm.offline.model.batch import TOKENS_PER_CHUNK
from pgsvd_vllm.offline.model.draw import draw
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.source import ModelSource

# Texts and images, [pairs, width] each.
Embeddings = tuple[torch.Tensor, torch.Tensor]


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch, which may run in any process: 32 bits, all that torch's generator takes on a CPU."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


def next_token_backward(stream: LayerStream, number: int, leaves: dict[int, torch.Tensor], seed: int) -> int:
    """Compute the gradients of the summed cross entropy of a batch's next tokens in `.grad` of outputs of layers.

    Args:
        stream: of a language or vision-language model, whose LM head is loaded.
        number: of the batch.
        leaves: layer index -> its output [..., hidden], for the layers in `LayerStream.read`; leaves of the autograd
            graph.
        seed: of the draw of labels.

    Returns:
        The number of loss terms.

    Raises:
        InputError: the model's predictions are not finite.
    """
    generator = torch.Generator(stream.device).manual_seed(batch_seed(seed, number))
    ids = stream.batches[number]["input_ids"]
    next_ids = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1)
    if len(leaves) > 1 or "pixel_values" in stream.batches[number]:
        logits = stream.output(number, leaves).logits.flatten(0, 1)
        return _cross_entropy(stream, logits, next_ids.flatten(), generator)
    # A few tokens at a time: the logits of a batch may not fit into memory, and small buffers are faster.
    leaf = leaves[len(stream.source.layers) - 1]
    terms = 0
    for i, start in itertools.product(range(len(ids)), range(0, ids.shape[1], TOKENS_PER_CHUNK)):
        rows, part = slice(i, i + 1), slice(start, start + TOKENS_PER_CHUNK)
        logits = stream.logits(ids[rows, part].to(stream.device), leaf[rows, part])
        terms += _cross_entropy(stream, logits[0], next_ids[i, part], generator)
    return terms


def _cross_entropy(
    stream: LayerStream, logits: torch.Tensor, next_ids: torch.Tensor, generator: torch.Generator
) -> int:
    """Backward of the cross entropy of drawn labels at all positions whose next token is no placeholder.

    Args:
        stream: of the model.
        logits: [tokens, vocabulary].
        next_ids: int64 [tokens].
        generator: of the labels.
    """
    placeholders = stream.source.placeholders  # image tokens are inputs and never predicted
    predicted = torch.tensor([token not in placeholders for token in next_ids.tolist()], device=logits.device)
    places = predicted.nonzero()[:, 0]
    # The loss's gradient in closed form, the predictions minus the drawn label.
    with torch.no_grad():
        error = torch.zeros_like(logits)
        for rows in places.split(TOKENS_PER_CHUNK):
            shares, labels = _draw(stream.source, stream.dtype, logits[rows], generator)
            shares[torch.arange(len(rows), device=shares.device), labels] -= 1
            error[rows] = shares.to(error.dtype)
    logits.backward(error)
    return len(places)


def _draw(
    source: ModelSource, dtype: torch.dtype, logits: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictions, float32, of rows of logits of a model in `dtype`, and a drawn label int64 [rows].

    Raises:
        InputError: the predictions are not finite.
    """
    shares = _finite(source, dtype, logits.detach().softmax(-1, dtype=torch.float32))
    uniform = torch.rand(len(shares), generator=generator, device=shares.device)
    return shares, draw(shares, uniform)


def _finite(source: ModelSource, dtype: torch.dtype, predictions: torch.Tensor) -> torch.Tensor:
    """The predictions of a model in `dtype`; raises InputError if they are not finite."""
    if not is_finite(predictions):
        raise overflow(f"{source.folder}: the model's prediction", dtype)
    return predictions


def contrastive_gradients(source: ModelSource, embeddings: Embeddings, seed: int) -> Embeddings:
    """The gradients of the contrastive loss over all images and texts.

    Args:
        source: a dual encoder, whose parameters outside of the layers are loaded.
        embeddings: of all pairs.
        seed: of the draw of labels.

    Returns:
        The gradients with respect to the embeddings.

    Raises:
        InputError: the model's predictions are not finite.
    """
    model = source.model
    scale = model.get_parameter("logit_scale")
    generator = torch.Generator(scale.device).manual_seed(seed)
    texts, images = (part.detach().to(scale.device).float().requires_grad_() for part in embeddings)
    logits = texts @ images.T * scale.float().exp()
    if hasattr(model, "logit_bias"):
        logits = logits + model.get_parameter("logit_bias").float()
        labels = torch.bernoulli(_finite(source, scale.dtype, logits.detach().sigmoid()), generator=generator)
        F.binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
    else:
        loss = torch.zeros((), device=logits.device)
        for rows in (logits, logits.T):
            loss = loss + F.cross_entropy(rows, _draw(source, scale.dtype, rows, generator)[1], reduction="sum")
        loss.backward()
    assert texts.grad is not None
    assert images.grad is not None
    return texts.grad, images.grad

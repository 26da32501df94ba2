"""The loss whose gradients measure sensitivities, with labels drawn from the model's own predictions.

For a language or vision-language model it is the cross entropy of every next token. For a dual encoder it is the
contrastive loss over all images and texts of the calibration set: softmax cross entropy in both directions (CLIP), or
binary cross entropy of every pair (SigLIP). Drawn labels make the gradient moments the Fisher information.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.linalg import overflow
from pgsvd_vllm.offline.model.batch import TOKENS_PER_CHUNK
from pgsvd_vllm.offline.model.draw import draw
from pgsvd_vllm.offline.model.layerwise import LayerStream

# Batch -> layer index -> the layer's output, a leaf of the autograd graph.
Leaves = dict[int, dict[int, torch.Tensor]]


class Objective:
    """The loss of one model.

    Args:
        stream: of the model, whose LM head is loaded.
        seed: of the draw of labels.
    """

    def __init__(self, stream: LayerStream, seed: int) -> None:
        self.stream = stream
        self.generator = torch.Generator(stream.device).manual_seed(seed)
        # Image tokens are inputs and never predicted.
        self.placeholders = stream.source.placeholders

    def backward(self, outputs: Leaves, done: Callable[[int], object] = lambda _tokens: None) -> int:
        """Compute the gradients of the summed loss in `.grad` of the outputs.

        Args:
            outputs: batch -> layer index -> its output [..., hidden], for the layers in `LayerStream.read`.
            done: called with the tokens of each batch of text that is done.

        Returns:
            The number of loss terms.

        Raises:
            InputError: the model's predictions are not finite.
        """
        if self.stream.source.is_dual_encoder:
            return self._contrastive(outputs)
        terms = 0
        for number, leaves in outputs.items():
            terms += self._next_token(number, leaves)
            done(self.stream.batches[number]["input_ids"].numel())
        return terms

    def _next_token(self, number: int, leaves: dict[int, torch.Tensor]) -> int:
        """Backward of the cross entropy of a batch's next tokens; returns the number of terms."""
        stream = self.stream
        ids = stream.batches[number]["input_ids"]
        next_ids = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1)
        if len(leaves) > 1 or "pixel_values" in stream.batches[number]:
            return self._cross_entropy(stream.output(number, leaves).logits.flatten(0, 1), next_ids.flatten())
        # A few tokens at a time: the logits of a batch may not fit into memory, and small buffers are faster.
        leaf = leaves[len(stream.source.layers) - 1]
        terms = 0
        for i, start in itertools.product(range(len(ids)), range(0, ids.shape[1], TOKENS_PER_CHUNK)):
            rows, part = slice(i, i + 1), slice(start, start + TOKENS_PER_CHUNK)
            logits = stream.logits(ids[rows, part].to(stream.device), leaf[rows, part])
            terms += self._cross_entropy(logits[0], next_ids[i, part])
        return terms

    def _cross_entropy(self, logits: torch.Tensor, next_ids: torch.Tensor) -> int:
        """Backward of the cross entropy of drawn labels at all positions whose next token is no placeholder.

        Args:
            logits: [tokens, vocabulary].
            next_ids: int64 [tokens].
        """
        predicted = torch.tensor([token not in self.placeholders for token in next_ids.tolist()], device=logits.device)
        places = predicted.nonzero()[:, 0]
        # The loss's gradient in closed form, the predictions minus the drawn label.
        with torch.no_grad():
            error = torch.zeros_like(logits)
            for rows in places.split(TOKENS_PER_CHUNK):
                shares, labels = self._draw(logits[rows])
                shares[torch.arange(len(rows), device=shares.device), labels] -= 1
                error[rows] = shares.to(error.dtype)
        logits.backward(error)
        return len(places)

    def _draw(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions, float32, of rows of logits, and a drawn label int64 [rows].

        Raises:
            InputError: the predictions are not finite.
        """
        shares = self._finite(logits.detach().softmax(-1, dtype=torch.float32))
        uniform = torch.rand(len(shares), generator=self.generator, device=shares.device)
        return shares, draw(shares, uniform)

    def _finite(self, predictions: torch.Tensor) -> torch.Tensor:
        """The predictions; raises InputError if they are not finite."""
        if not is_finite(predictions):
            raise overflow(f"{self.stream.source.folder}: the model's prediction", self.stream.dtype)
        return predictions

    def _contrastive(self, outputs: Leaves) -> int:
        """Backward of the contrastive loss over all images and texts; returns the number of both."""
        model = self.stream.source.model
        found = [self.stream.output(number, leaves) for number, leaves in outputs.items()]
        texts, images = (
            torch.cat([getattr(o, name) for o in found]).float() for name in ("text_embeds", "image_embeds")
        )
        logits = texts @ images.T * model.get_parameter("logit_scale").float().exp()
        if hasattr(model, "logit_bias"):
            logits = logits + model.get_parameter("logit_bias").float()
            labels = torch.bernoulli(self._finite(logits.detach().sigmoid()), generator=self.generator)
            F.binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
        else:
            loss = torch.zeros((), device=logits.device)
            for rows in (logits, logits.T):
                loss = loss + F.cross_entropy(rows, self._draw(rows)[1], reduction="sum")
            loss.backward()
        return 2 * len(texts)

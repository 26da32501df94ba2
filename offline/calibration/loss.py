"""The loss whose gradients measure sensitivities, with labels drawn from the model's own predictions.

For a language or vision-language model it is the cross entropy of every next token. For a dual encoder it is the
contrastive loss over all images and texts of the calibration set: softmax cross entropy in both directions (CLIP), or
binary cross entropy of every pair (SigLIP). Drawn labels make the gradient moments the Fisher information.
"""

import torch
import torch.nn.functional as F

from pgsvd_vllm.offline.linalg import overflow
from pgsvd_vllm.offline.model.draw import draw
from pgsvd_vllm.offline.model.layerwise import LayerStream

# Tokens whose predictions are in memory at a time.
TOKENS_PER_CHUNK = 128
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

    def backward(self, outputs: Leaves) -> int:
        """Compute the gradients of the summed loss in `.grad` of the outputs.

        Args:
            outputs: batch -> layer index -> its output [..., hidden], for the layers in `LayerStream.read`.

        Returns:
            The number of loss terms.

        Raises:
            InputError: the model's predictions are not finite.
        """
        if self.stream.source.is_dual_encoder:
            return self._contrastive(outputs)
        return sum(self._next_token(number, leaves) for number, leaves in outputs.items())

    def _next_token(self, number: int, leaves: dict[int, torch.Tensor]) -> int:
        """Backward of the cross entropy of a batch's next tokens; returns the number of terms."""
        stream = self.stream
        if len(leaves) > 1 or "pixel_values" in stream.batches[number]:
            ids = stream.batches[number]["input_ids"]
            return self._cross_entropy(stream.output(number, leaves).logits, ids)
        # One window at a time, since the logits of a batch may not fit into memory.
        last = len(stream.source.layers) - 1
        terms = 0
        for i, row in enumerate(stream.batches[number]["input_ids"]):
            ids = row[None].to(stream.device)
            logits = stream.logits(ids, leaves[last][i : i + 1])
            terms += self._cross_entropy(logits, ids)
        return terms

    def _cross_entropy(self, logits: torch.Tensor, ids: torch.Tensor) -> int:
        """Backward of the cross entropy of drawn labels at all positions whose next token is no placeholder."""
        next_ids = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1).flatten()
        predicted = torch.tensor([token not in self.placeholders for token in next_ids.tolist()], device=logits.device)
        places = predicted.nonzero()[:, 0]
        # The loss's gradient in closed form, the predictions minus the drawn label; small buffers are faster.
        with torch.no_grad():
            flat = logits.flatten(0, 1)
            error = torch.zeros_like(flat)
            for rows in places.split(TOKENS_PER_CHUNK):
                shares, labels = self._draw(flat[rows])
                shares[torch.arange(len(rows), device=shares.device), labels] -= 1
                error[rows] = shares.to(error.dtype)
        logits.backward(error.view_as(logits))
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
        if not torch.isfinite(predictions).all():
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

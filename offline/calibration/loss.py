"""The loss whose gradients tell what matters, with labels drawn from the model itself.

Of a language model the cross entropy of every token; of a model that compares images with texts that of the image
which belongs to a text and of the text which belongs to an image, among all in the calibration data (CLIP), or of
whether an image and a text belong together (SigLIP).
"""

import torch
import torch.nn.functional as F

from pgsvd_vllm.offline.model.layerwise import LayerStream, logits_after

Leaves = dict[int, dict[int, torch.Tensor]]


class Objective:
    """The loss of one model.

    Args:
        stream: of the model, whose head is loaded.
        seed: of the draw of labels.
    """

    def __init__(self, stream: LayerStream, seed: int) -> None:
        self.stream = stream
        self.generator = torch.Generator(stream.device).manual_seed(seed)
        # They are given, not predicted.
        self.given = stream.source.placeholders

    def backward(self, outputs: Leaves) -> int:
        """Gradients of the summed loss, in `.grad` of the outputs.

        Args:
            outputs: batch -> index of a layer -> its output, of the layers that are read outside of their tower.

        Returns:
            the number of terms.
        """
        if self.stream.source.is_dual_encoder:
            return self._compare(outputs)
        return sum(self._generate(number, leaves) for number, leaves in outputs.items())

    def _generate(self, number: int, leaves: dict[int, torch.Tensor]) -> int:
        """Cross entropy of the batch's next tokens."""
        stream = self.stream
        if len(leaves) > 1 or "pixel_values" in stream.batches[number]:
            ids = stream.batches[number]["input_ids"]
            return self._losses(stream.output(number, leaves).logits, ids)
        # A window at a time: logits are wide.
        last = len(stream.source.layers) - 1
        terms = 0
        for i, row in enumerate(stream.batches[number]["input_ids"]):
            ids = row[None].to(stream.device)
            logits = logits_after(stream.source.model, stream.source.layers, ids, leaves[last][i : i + 1])
            terms += self._losses(logits, ids)
        return terms

    def _losses(self, logits: torch.Tensor, ids: torch.Tensor) -> int:
        """Backward of the cross entropy of drawn labels, wherever not an image comes next."""
        following = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1).flatten()
        wanted = torch.tensor([token not in self.given for token in following.tolist()], device=logits.device)
        rows = logits.flatten(0, 1)[wanted].float()
        labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=self.generator)[:, 0]
        F.cross_entropy(rows, labels, reduction="sum").backward()
        return len(rows)

    def _compare(self, outputs: Leaves) -> int:
        """Of every image among all texts and every text among all images."""
        model = self.stream.source.model
        found = [self.stream.output(number, leaves) for number, leaves in outputs.items()]
        texts, images = (
            torch.cat([getattr(o, name) for o in found]).float() for name in ("text_embeds", "image_embeds")
        )
        logits = texts @ images.T * model.get_parameter("logit_scale").float().exp()
        if hasattr(model, "logit_bias"):
            logits = logits + model.get_parameter("logit_bias").float()
            labels = torch.bernoulli(logits.detach().sigmoid(), generator=self.generator)
            F.binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
        else:
            loss = torch.zeros((), device=logits.device)
            for rows in (logits, logits.T):
                labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=self.generator)[:, 0]
                loss = loss + F.cross_entropy(rows, labels, reduction="sum")
            loss.backward()
        return 2 * len(texts)

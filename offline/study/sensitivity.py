"""How much attention and feed-forward projections matter: what an error costs, by kind and by layer."""

import re
from collections.abc import Callable

from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.ranks.stored import size
from pgsvd_vllm.offline.study.rows import SENSITIVITY, Row
from pgsvd_vllm.offline.study.study import Study

# The relative output error whose predicted loss is shown.
ERROR = 0.1
# Series of a kind of projection.
COST, TOTAL = "mean nats", "total nats"
HALF, ALLOWED, KEPT = "error at half rank", "error at the optimum", "kept at the optimum"
# The list of layers, the number of the layer, and the projection's name in it.
_NAME = re.compile(r"(.*?)\.(\d+)\.(.*)")


def sensitivity_rows(study: Study) -> list[Row]:
    """Predicted loss of a relative error of 10 % by layer; by kind also the errors at the optimum of the study's share.

    Raises:
        ChoiceError: no ranks remove the study's share.
    """
    form = study.plan.settings.storages[0].form
    modules = study.front(study.loss, form).at(study.ratio).modules
    profiles = study.profiles
    kinds: dict[str, list[Projection]] = {}
    for p in study.projections:
        kinds.setdefault(_kind(p, len(study.plan.projections.towers) > 1), []).append(p)

    def cost(p: Projection) -> float:
        # Half the sum of the energies is the loss of an error of 100 %, and losses grow with its square.
        return 0.5 * float(study.loss[p.name].sum()) * ERROR**2

    def half(p: Projection) -> float:
        return float(profiles[p.name][min(p.out_features, p.in_features) // 2])

    def allowed(p: Projection) -> float:
        return float(profiles[p.name][modules[p.name].rank]) if p.name in modules else 0.0

    def stored(p: Projection) -> int:
        return size(p, modules[p.name].rank, form) if p.name in modules else p.numel

    rows: list[Row] = []
    means: list[tuple[str, str, Callable[[Projection], float]]] = [
        (COST, "nats for an error of 10 %, mean", cost),
        (HALF, "error at half of the full rank, mean", half),
        (ALLOWED, "error at the optimum, mean", allowed),
    ]
    for kind, members in kinds.items():
        for series, case, of in means:
            value = sum(map(of, members)) / len(members)
            rows.append(Row(SENSITIVITY, f"{kind}: {case}", value, series, kind))
        case = f"{kind}: nats for an error of 10 % in all"
        rows.append(Row(SENSITIVITY, case, sum(map(cost, members)), TOTAL, kind))
        kept = sum(map(stored, members)) / sum(p.numel for p in members)
        rows.append(Row(SENSITIVITY, f"{kind}: kept share at the optimum", kept, KEPT, kind))
    for kind, members in kinds.items():
        rows += [Row(SENSITIVITY, f"{p.name}: nats for an error of 10 %", cost(p), kind, _layer(p)) for p in members]
    return rows


def _kind(projection: Projection, named: bool) -> str:
    """A projection's name in its layer, such as `self_attn.q_proj`; with the tower's name in front if `named`."""
    found = _NAME.fullmatch(projection.name)
    kind = projection.name if found is None else found[3]
    return f"{projection.tower} {kind}" if named else kind


def _layer(projection: Projection) -> int:
    """The number of a projection's layer in its list of layers; 0 outside of one."""
    found = _NAME.fullmatch(projection.name)
    return 0 if found is None else int(found[2])

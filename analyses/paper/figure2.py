"""Figures 2 and 8: mean-ablation layer by layer, and how far triggered terms are from clean ones.

Paper:     He et al. (2025), Figures 2 and 8, section 3.3: forward, backward and separate ablation; layer-wise MMD.
Command:   python -m analyses.figure2 --model-family shapes
Run time:  about 4 minutes, one thread.
Expected:  infected heads centre on the last layer; infected MLPs are spread over several late layers.
Writes:    analyses/results/FAMILY/figure2.json, figure2-asr.png, figure2-cacc.png, figure2-mmd.png

Forward ablates layers 0 to x, backward x to the last, separate x alone. Dashed lines are the model before; thin dotted ones controls: clean
images of other classes that the same ablation sends to the target. MMD of unit terms is the paper's estimate (biased, sigma 10, times
1000), and beside it the unbiased one with a kernel of the terms' own width, which does not grow with their size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import (
    RANGE,
    SPREAD,
    by_attack,
    carries,
    curve,
    groups,
    markdown,
    mean,
    over_models,
)
from decompclip.decomposition.moments import Moments
from decompclip.figures.curves import LinePanel, line_panels
from decompclip.figures.scatter import PERCENT
from decompclip.operators.mmd import Kernel, layer_mmd
from decompclip.operators.sweep_results import Kind, Scheme
from decompclip.operators.sweeps import ablation_sweep

TITLE = "Figures 2 and 8: ablation layer by layer, and MMD"

KINDS = {"heads": "heads", "mlps": "MLPs"}
SCHEMES = {"forward": "layers 0 to x", "backward": "layers x to the last", "separate": "layer x alone"}


@dataclass(frozen=True)
class Config:
    images: int = 1_000
    seed: int = 0
    mmd_images: int = 300


@torch.no_grad()
def measure(case: Case, config: Config) -> dict[str, Any]:
    moments = Moments.of(case.terms("fit"), second=False)
    tables = [ablation_sweep(case.terms(part), moments, case.classifier) for part in ("clean", "triggered")]

    def rates(clean: torch.Tensor, triggered: torch.Tensor) -> dict[str, float]:
        report = case.report(clean, triggered).to_dict()
        return {key: round(100 * report[key]["value"], 3) for key in ("asr", "control", "cacc")}

    sweeps = {
        kind: {
            scheme: [
                rates(*(found[kind, scheme][layer] for found in tables))
                for layer in range(len(tables[0][kind, scheme]))
            ]
            for scheme in get_args(Scheme)
        }
        for kind in get_args(Kind)
    }
    chosen = case.others.nonzero()[: config.mmd_images, 0]
    terms = [case.terms(part)[chosen] for part in ("clean", "triggered")]
    by_kernel = {}
    for kernel in get_args(Kernel):
        mmd = layer_mmd(*terms, kernel=kernel, permutations=0, paired=True)
        by_kernel[kernel] = {
            kind: [
                float(f"{v:.5g}")
                for part, v in zip(mmd.parts, mmd.values.tolist(), strict=True)
                if part.kind == kind
            ]
            for kind in KINDS
        }
    return {"before": rates(*(found.before for found in tables)), "sweeps": sweeps, "mmd": by_kernel}


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    return family.measured(members, config, measure)


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"asr": _sweep(record, "asr"), "cacc": _sweep(record, "cacc"), "mmd": _mmd(record)}


def _sweep(record: Mapping[str, Any], rate: str) -> Any:
    models, panels = record["found"]["models"], []
    for kind, title in KINDS.items():
        for scheme, layers in SCHEMES.items():
            curves = {}
            for group, names in groups(record).items():
                steps = [models[name]["sweeps"][kind][scheme] for name in names]
                values = [[step[rate] for step in sweep] for sweep in steps]
                thin = [[step["control"] for step in sweep] for sweep in steps] if rate == "asr" else ()
                curves[group] = curve(range(len(values[0])), values, thin)
            unit = "attack success, %" if rate == "asr" else "clean accuracy, %"
            before = {
                group: mean(models[n]["before"][rate] for n in names)
                for group, names in groups(record).items()
            }
            panels.append(
                LinePanel(
                    f"{title}, {layers}", "x, layer", unit, curves, ends=PERCENT, levels=before, whole=True
                )
            )
    return line_panels(panels, columns=3, bands=RANGE, levels="before")


def _mmd(record: Mapping[str, Any]) -> Any:
    models = record["found"]["models"]
    units = {"paper": "MMD² × 1000", "unbiased": "MMD², unbiased"}
    panels = [
        LinePanel(
            f"{title} of a layer",
            "layer",
            unit,
            {
                group: curve(
                    range(len(models[names[0]]["mmd"][kernel][kind])),
                    [models[n]["mmd"][kernel][kind] for n in names],
                )
                for group, names in groups(record).items()
            },
            whole=True,
        )
        for kernel, unit in units.items()
        for kind, title in KINDS.items()
    ]
    return line_panels(panels, columns=2, row_height=210, shared_y=False, bands=RANGE)


SETTINGS: dict[str, tuple[str, str, int] | None] = {
    "as it is": None,
    "last heads": ("heads", "separate", -1),
    "all heads": ("heads", "forward", -1),
    "last MLP": ("mlps", "separate", -1),
    "last five MLPs": ("mlps", "backward", -5),
    "all MLPs": ("mlps", "forward", -1),
}
"""Kind, scheme and layer of the settings that the finding speaks of."""


def left(model: Mapping[str, Any], setting: str) -> float:
    """Attack success less its control, in points."""
    rates = _rates(model, setting)
    return rates["asr"] - rates["control"]


def cacc(model: Mapping[str, Any], setting: str) -> float:
    return _rates(model, setting)["cacc"]


def _rates(model: Mapping[str, Any], setting: str) -> Mapping[str, float]:
    place = SETTINGS[setting]
    if place is None:
        return model["before"]
    kind, scheme, layer = place
    steps = model["sweeps"][kind][scheme]
    return steps[max(layer, -len(steps))]


def table(record: Mapping[str, Any]) -> str:
    """By attack: what the settings leave of the attack, and the layers of the largest MMD."""
    models = record["found"]["models"]
    rows = [["attack", "trigger", *SETTINGS, "MMD of heads: most in layer", "MMD of MLPs: most in layer"]]
    for attack, names in by_attack(record).items():
        found = [models[name] for name in names]
        cells = [f"{mean(left(m, setting) for m in found):.1f}" for setting in SETTINGS]
        peaks = [", ".join(sorted({str(_peak(m["mmd"]["paper"][kind])) for m in found})) for kind in KINDS]
        rows.append([attack, record["models"][names[0]]["kind"], *cells, *peaks])
    return f"{markdown(rows)}\n\nAttack success less its control, in points; means over seeds."


def _peak(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def finding(record: Mapping[str, Any]) -> str:
    """The paper speaks of heads under local triggers and of MLPs under global ones; every attack counts once."""
    return (
        f"Finding 2 ({SPREAD}, attacks as units). {_of_heads(record)} {_of_mlps(record)} {_of_mmd(record)} Ablating terms misses what works through later "
        "layers (`direct_or_causal`); an attack that no single kind carries stays whatever is ablated."
    )


def _falls(record: Mapping[str, Any], extent: str) -> dict[str, list[float]]:
    """Falls of attack success less its control, by setting, of each attack; empty without attacks of the extent."""
    models, facts = record["found"]["models"], record["models"]
    attacks = [names for names in by_attack(record).values() if facts[names[0]]["kind"].startswith(extent)]
    if not attacks:
        return {}
    return {
        s: [mean(left(models[n], "as it is") - left(models[n], s) for n in names) for names in attacks]
        for s in SETTINGS
    }


def _verdict(record: Mapping[str, Any], setting: str, holds: bool) -> str:
    """Nothing, where all of a kind may go and the model still tells the classes."""
    models = list(record["found"]["models"].values())
    before, after = (mean(cacc(m, s) for m in models) for s in ("as it is", setting))
    if not carries(before, after):
        return f"cannot be tested, as without {setting} {after:.1f} of {before:.1f} % clean accuracy are left"
    return "hold" if holds else "do not show"


def _of_heads(record: Mapping[str, Any]) -> str:
    falls = _falls(record, "local")
    if not falls:
        return "No local trigger among the models: nothing on heads."
    holds = mean(falls["last heads"]) > max(5.0, 0.5 * mean(falls["all heads"]))
    return (
        f"Heads centred on the last layer under local triggers: {_verdict(record, 'all heads', holds)}; without the last layer's heads "
        f"{over_models(falls['last heads'])} points of attack success less control are lost, without all heads {over_models(falls['all heads'])}."
    )


def _of_mlps(record: Mapping[str, Any]) -> str:
    falls = _falls(record, "global")
    if not falls:
        return "No global trigger among the models: nothing on MLPs."
    late, last, every = (falls[setting] for setting in ("last five MLPs", "last MLP", "all MLPs"))
    holds = mean(late) > max(5.0, 0.5 * mean(every)) and mean(last) < 0.5 * mean(late)
    return (
        f"MLPs spread over late layers under global ones: {_verdict(record, 'all MLPs', holds)}; without the last five {over_models(late)} points "
        f"are lost, without the last alone {over_models(last)}, without all {over_models(every)}."
    )


def _of_mmd(record: Mapping[str, Any]) -> str:
    models = list(record["found"]["models"].values())

    def share(kernel: str, kind: str) -> float:
        return 100 * mean(_last(m["mmd"][kernel][kind]) for m in models)

    layers = len(models[0]["mmd"]["paper"]["heads"])
    return (
        f"The last of {layers} layers has {share('paper', 'heads'):.0f} % of the heads' MMD and {share('paper', 'mlps'):.0f} % of the MLPs', "
        f"mean over {len(models)} models; by the unbiased estimate, which does not grow with the terms' size, "
        f"{share('unbiased', 'heads'):.0f} and {share('unbiased', 'mlps'):.0f} % (an equal share is {100 / layers:.0f} %)."
    )


def _last(values: list[float]) -> float:
    """Share of the last value; negative estimates count as nothing."""
    known = [max(0.0, value) for value in values]
    return known[-1] / (sum(known) or 1.0)


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))

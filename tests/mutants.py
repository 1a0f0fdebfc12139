"""Mutation testing by hand: does some test fail when one line of the core is wrong?

    python -m tests.mutants                              100 mutants, two at a time, some ten minutes on two idle cores
    python -m tests.mutants --seed 1 --count 60 --room decomposition --room evaluation

A mutant is the core with one expression changed: another comparison or operator, a constant, a negation, an argument
dropped or swapped. The tests of its room run on a copy of the tree, which they must pass before any mutant is judged;
those of its name, and those that import the changed module, come first. A mutant that no test notices calls for a test, or, where it means the
same, for an entry in `EQUIVALENT`. One that outlasts five times what the tests take unchanged is told apart and is no kill.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.97
"""The share of mutants, equivalent ones left out, that tests must notice."""

HEAVY = (
    "torch",
    "open_clip",
    "transformer_lens",
    "timm",
    "pandas",
    "scipy.stats",
    "sklearn.covariance",
    "sklearn.linear_model",
    "sklearn.metrics",
    "plotly.graph_objects",
    "plotly.subplots",
    "beartype",
    "einops",
    "safetensors.torch",
    "pytest",
    "hypothesis",
)
"""Imported once, before the runs fork off; nothing of ours is among them."""


@dataclass(frozen=True)
class Room:
    """Part of the core.

    Attributes:
        sources: patterns of the files that are mutated.
        tests: files or folders that must notice.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]


DEFENSES = ("agnostic", "bake", "decomp", "distances", "fitted", "guard", "selector")

ROOMS = {
    "tower": Room(
        ("decompclip/tower/*.py", "decompclip/models/clip.py"),
        (
            *(f"tests/models/test_{name}.py" for name in ("attention", "vit", "convert", "clip", "prompts")),
            "tests/models/test_towers.py",
            "tests/decomposition/test_activations.py",
        ),
    ),
    "decomposition": Room(
        ("decompclip/decomposition/*.py",), ("tests/decomposition", "tests/operators/test_extract.py")
    ),
    "operators": Room(("decompclip/operators/*.py",), ("tests/operators",)),
    "evaluation": Room(
        ("decompclip/evaluation/*.py", "decompclip/models/zero_shot.py"),
        ("tests/evaluation", "tests/models/test_prompts.py"),
    ),
    "defenses": Room(
        tuple(f"decompclip/defenses/{name}.py" for name in DEFENSES),
        tuple(
            f"tests/defenses/test_{name}.py"
            for name in ("agnostic", "class_distance", "decomp", "fitted", "guard", "bake", "token_rep")
        ),
    ),
    "verdict": Room(("decompclip/audit/verdict.py",), ("tests/audit/test_verdict.py",)),
}

ROWS = "the default is dim=1, the last of a matrix"
ONE = "a constant of every head and layer"
TINY = "a bound that nothing but rounding is below"
GRAM = "R and what it is made from have one Gram matrix, and no more of it is read"
NONZERO = "read by its places alone, which are those of numbers too"
SQUARE = "of a square matrix, either side"
SEED = "a seed of draws: any number serves"
KEY = "a key of the image: any length serves"
ACCIDENT = "two such numbers are equal by accident alone"
SAME_MAPS = "equal maps: of the model's own one copy is held"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "decompclip/evaluation/metrics.py",
        "generator = np.random.Generator(np.random.Philox(key=[seed, 0]))",
        "generator = np.random.Generator(np.random.Philox(key=[seed, 1]))",
    ): SEED,
    (
        "decompclip/models/zero_shot.py",
        "length = int(ends.max()) + 1",
        "length = int(ends.max()) + 2",
    ): "a position behind the last end, which no text reads",
    (
        "decompclip/models/zero_shot.py",
        "return F.normalize(sums, dim=-1)  # a mean's direction is its sum's",
        "return F.normalize(sums)  # a mean's direction is its sum's",
    ): ROWS,
    (
        "decompclip/models/zero_shot.py",
        "features = F.normalize(encode_text(batch), dim=-1)",
        "features = F.normalize(encode_text(batch))",
    ): ROWS,
    (
        "decompclip/models/clip.py",
        "return F.normalize(features, dim=-1) if normalize else features",
        "return F.normalize(features) if normalize else features",
    ): ROWS,
    (
        "decompclip/models/clip.py",
        "key = key_of(names, chosen, self.tokenizer)",
        "key = key_of(chosen, names, self.tokenizer)",
    ): "a key: names and templates in either order",
    (
        "decompclip/operators/inputs.py",
        "F.normalize(model.encode_text(texts[start : start + batch_size]).float(), dim=-1)",
        "F.normalize(model.encode_text(texts[start:start + batch_size]).float())",
    ): ROWS,
    (
        "decompclip/operators/roles.py",
        "mean = torch.zeros(()) if wide is None else F.normalize(wide, dim=-1).mean(0)",
        "mean = torch.zeros(()) if wide is None else F.normalize(wide).mean(0)",
    ): ROWS,
    (
        "decompclip/operators/roles.py",
        "chance = _chance(F.normalize(wide, dim=-1), mean, samples, (len(A), len(B)), generator)",
        "chance = _chance(F.normalize(wide), mean, samples, (len(A), len(B)), generator)",
    ): ROWS,
    (
        "decompclip/operators/scores.py",
        "return F.normalize(F.normalize(model.encode_text(texts), dim=-1).mean(0), dim=-1)",
        "return F.normalize(F.normalize(model.encode_text(texts)).mean(0), dim=-1)",
    ): ROWS,
    (
        "decompclip/operators/scores.py",
        "return lambda features: F.normalize(features, dim=-1) @ along.to(features)",
        "return lambda features: F.normalize(features) @ along.to(features)",
    ): ROWS,
    (
        "decompclip/defenses/agnostic.py",
        "return normalize(classifier - classifier.mean(0), dim=1)",
        "return normalize(classifier - classifier.mean(0))",
    ): ROWS,
    (
        "decompclip/defenses/agnostic.py",
        "return normalize(rest - HAIR * rest.norm(dim=1, keepdim=True) * answers, dim=1)",
        "return normalize(rest - HAIR * rest.norm(dim=1, keepdim=True) * answers)",
    ): ROWS,
    **{
        (
            "decompclip/defenses/agnostic.py",
            "return 1 / d.coords[:, 0, 0, -1] if d.maps.extras else d.embed.new_ones(len(d))",
            f"return 1 / d.coords[:, {place}, -1] if d.maps.extras else d.embed.new_ones(len(d))",
        ): ONE
        for place in ("1, 0", "0, 1")
    },
    (
        "decompclip/defenses/agnostic.py",
        "self.mean_, self.deviation_ = raw.mean(0), raw.std(0).clamp_min(1e-9)",
        "self.mean_, self.deviation_ = raw.mean(0), raw.std(0).clamp_min(2e-09)",
    ): TINY,
    (
        "decompclip/defenses/agnostic.py",
        "self.spread_ = views[:, : len(DISTANCES)].sum(1).std().clamp_min(1e-9)",
        "self.spread_ = views[:, : len(DISTANCES)].sum(1).std().clamp_min(2e-09)",
    ): TINY,
    (
        "decompclip/defenses/guard.py",
        "isinstance(named, dict) and named and known.keys() >= named.keys()",
        "isinstance(named, dict) and named and known.keys() > named.keys()",
    ): "a guard has one defense: never all three of them",
    **{
        (
            "decompclip/defenses/distances.py",
            "values, basis = torch.linalg.svd(centred, full_matrices=False)[1:]",
            f"values, basis = torch.linalg.svd(centred{more})[1:]",
        ): "the same rows, and below them others that are cut off"
        for more in ("", ", full_matrices=True")
    },
    **{
        ("decompclip/defenses/distances.py", before, after): SQUARE
        for before, after in (
            ("dim = covariance.shape[-1]", "dim = covariance.shape[-2]"),
            (
                "penalised = gram + penalty * torch.eye(gram.shape[-1]).to(gram)",
                "penalised = gram + penalty * torch.eye(gram.shape[-2]).to(gram)",
            ),
        )
    },
    **{
        ("decompclip/defenses/distances.py", before, before.replace(number, twice)): TINY
        for before, number, twice in (
            ("floor = 1e-10 * values.amax(-1, keepdim=True)", "1e-10", "2e-10"),
            ("kept = int((values > 1e-6 * values[0]).sum())", "1e-6", "2e-06"),
            ("kept = int((values > 1e-6 * values[0]).sum())", "values >", "values >="),
            (
                "return (self._of(d) - self.logs_.mean(0)) / self.logs_.std(0).clamp_min(1e-9)",
                "1e-9",
                "2e-09",
            ),
        )
    },
    (
        "decompclip/defenses/fitted.py",
        "place = math.ceil((n + 1) * (1 - fpr) - 1e-9)",
        "place = math.ceil((n + 1) * (1 - fpr) - 2e-09)",
    ): TINY,
    (
        "decompclip/defenses/fitted.py",
        "if not full or -draw > self._kept[0][0]:",
        "if not full or -draw >= self._kept[0][0]:",
    ): "two draws are equal by accident alone",
    **{
        ("decompclip/defenses/fitted.py", 'if device.type != "mps":  # which has no fp64', after): (
            "on the CPU, where tests run, what was read stays where it is; on a GPU they differ"
        )
        for after in (
            'if (not (device.type != "mps")):  # which has no fp64',
            'if device.type == "mps":  # which has no fp64',
        )
    },
    (
        "decompclip/defenses/selector.py",
        "if self.quantile > 0 and len(found) < (needed := ceil(1 / self.quantile - 1e-9)):",
        "if self.quantile > 0 and len(found) < (needed := ceil(1 / self.quantile - 2e-09)):",
    ): TINY,
    (
        "decompclip/defenses/selector.py",
        "least = torch.finfo(found.dtype).eps * found.abs().mean(0).clamp_min(1e-6)",
        "least = torch.finfo(found.dtype).eps * found.abs().mean(0).clamp_min(2e-06)",
    ): TINY,
    (
        "decompclip/defenses/selector.py",
        "return torch.where(lengths > 0, judged / lengths.clamp_min(torch.finfo(lengths.dtype).tiny).sqrt(), 0)",
        "return torch.where(lengths >= 0, judged / lengths.clamp_min(torch.finfo(lengths.dtype).tiny).sqrt(), 0)",
    ): "nothing over the least number is nothing too",
    **{
        (
            "decompclip/defenses/guard.py",
            "seed = int(torch.randint(2**31, (), generator=self._draws))",
            f"seed = int(torch.randint({most}, (), generator=self._draws))",
        ): SEED
        for most in ("2*31", "3**31", "2**32")
    },
    (
        "decompclip/defenses/guard.py",
        "features = F.normalize(features, dim=-1) if normalize else features * length",
        "features = F.normalize(features) if normalize else features * length",
    ): ROWS,
    (
        "decompclip/decomposition/maps.py",
        "return WatchedWeights(_marks(module), views, torch.cat(views) if views else torch.zeros(0))",
        "return WatchedWeights(_marks(module), views, torch.cat(views) if views else torch.zeros(1))",
    ): "of a module without weights: it is not read",
    (
        "decompclip/operators/attribution.py",
        'along, labels = torch.empty(0), ("" if score is None else score.label,)',
        'along, labels = torch.empty(1), ("" if score is None else score.label,)',
    ): "for the checker of types alone: it is made anew with the first batch",
    **{
        ("decompclip/operators/extract.py", before, before.replace(", maps=self.none.maps", "")): SAME_MAPS
        for before in (
            "part = replace(part, maps=self.none.maps)",
            'return replace(moments, maps=self.none.maps), int(about["shards"]), about["skipped"], about["made"]',
        )
    },
    (
        "decompclip/operators/checkpoints.py",
        "moved, along = _past_common(after - before, still), F.normalize(after - after.mean(0), dim=1)",
        "moved, along = _past_common(after - before, still), F.normalize(after - after.mean(0))",
    ): ROWS,
    **{
        ("decompclip/operators/checkpoints.py", before, before.replace(*swap)): ACCIDENT
        for before, swap in (
            (
                "same = (change <= still)[:, None]  # rounding has directions too, of which nothing is to be said",
                ("<=", "<"),
            ),
            ("return torch.where(length > still, length, 0.0)", (">", ">=")),
            ("return x / median if median > still else torch.ones_like(x)", (">", ">=")),
        )
    },
    (
        "decompclip/operators/extract.py",
        "due = end == self.n_shards or time.monotonic() - written > EVERY",
        "due = end == self.n_shards or time.monotonic() - written >= EVERY",
    ): ACCIDENT,
    (
        "decompclip/operators/inputs.py",
        "if off[worst] > UNIT:",
        "if off[worst] >= UNIT:",
    ): "1e-3 is no difference of one and a float",
    (
        "decompclip/operators/lens.py",
        "reading = F.normalize(reading, dim=-1) if normalize else reading",
        "reading = F.normalize(reading) if normalize else reading",
    ): ROWS,
    (
        "decompclip/operators/features.py",
        "pooled = Rows(visual, with_mean=False)",
        "pooled = Rows(visual, with_mean=True)",
    ): "one hook more, of a block: those are left out in the next line",
    (
        "decompclip/operators/features.py",
        "best = [torch.cat(pair, dim=1) for pair in zip(best, new, strict=True)] if best else new",
        "best = [torch.cat(pair, dim=1) for pair in zip(new, best, strict=True)] if best else new",
    ): "both are sorted anew, and of equal ones any may be first",
    (
        "decompclip/operators/extract.py",
        '"pool": (int(self.model.cfg.pool_mlp > 0), d_embed),',
        '"pool": (int(self.model.cfg.pool_mlp > 1), d_embed),',
    ): "no MLP is of one neuron",
    (
        "decompclip/operators/mmd.py",
        "ends = min(0.0, 1.1 * low), max(1.08 * high, 1e-9)",
        "ends = min(0.0, 1.1 * low), max(1.08 * high, 2e-09)",
    ): TINY,
    (
        "decompclip/operators/mmd.py",
        "return int((found >= found[0] - 1e-12 * size).sum())",
        "return int((found >= found[0] - 2e-12 * size).sum())",
    ): TINY,
    (
        "decompclip/operators/mmd.py",
        "kept = torch.rand(n, permutations, generator=generator) < 0.5",
        "kept = torch.rand(n, permutations, generator=generator) <= 0.5",
    ): "one draw of 16 million is exactly a half",
    (
        "decompclip/operators/naming.py",
        "tied = any(excess[first] - excess[other] < 1e-9 for other in others)",
        "tied = any(excess[first] - excess[other] < 2e-09 for other in others)",
    ): TINY,
    (
        "decompclip/operators/naming.py",
        "tied = any(excess[first] - excess[other] < 1e-9 for other in others)",
        "tied = any(excess[first] - excess[other] <= 1e-9 for other in others)",
    ): TINY,
    (
        "decompclip/decomposition/decomposition.py",
        "shares = (torch.cat(parts) if len(parts) > 1 else parts[0]).unflatten(1, values.shape[1:3])",
        "shares = (torch.cat(parts) if len(parts) >= 1 else parts[0]).unflatten(1, values.shape[1:3])",
    ): "a copy of a single part",
    (
        "decompclip/decomposition/terms.py",
        "if not error <= tolerance:",
        "if not error < tolerance:",
    ): "two such numbers are equal by accident alone",
    (
        "decompclip/decomposition/terms.py",
        "return replace(parts[0], **joined)",
        "return replace(parts[1], **joined)",
    ): "what is not joined is alike in all parts, and a single one is not joined",
    (
        "decompclip/operators/neurons.py",
        "pooled = Rows(visual, with_mean=False)",
        "pooled = Rows(visual, with_mean=True)",
    ): "one hook more, of a block: those are left out in the next line",
    (
        "decompclip/operators/noise.py",
        "signs = torch.cat([d.features, d.mlps[:, -1]], 1).cpu() > 0",
        "signs = torch.cat([d.features, d.mlps[:, -1]], 1).cpu() >= 0",
    ): "a key of the image, drawn from its numbers: one that is exactly zero may count on either side",
    (
        "decompclip/operators/noise.py",
        "key = blake2b(np.packbits(known).tobytes(), digest_size=16, key=str(seed).encode()).digest()",
        "key = blake2b(np.packbits(known).tobytes(), digest_size=17, key=str(seed).encode()).digest()",
    ): KEY,
    (
        "decompclip/operators/noise.py",
        "key = blake2b(np.packbits(known).tobytes(), digest_size=16, key=str(seed).encode()).digest()",
        "key = blake2b(np.packbits(known).tobytes(), key=str(seed).encode()).digest()",
    ): KEY,
    (
        "decompclip/operators/noise.py",
        'generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)',
        'generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 2)',
    ): SEED,
    **{
        (
            "decompclip/operators/noise.py",
            "tokens = maps.heads.new_empty(*maps.heads.shape[:2], 0, maps.d_head, 0)",
            f"tokens = maps.heads.new_empty(*maps.heads.shape[:2], {sizes})",
        ): "empty in either way, and of d_head alone is it asked"
        for sizes in ("1, maps.d_head, 0", "0, maps.d_head, 1")
    },
    (
        "decompclip/operators/noise.py",
        "one = scales[..., -1] if terms.normalized else torch.ones_like(scales[..., -1])",
        "one = scales[..., -1] if terms.normalized else torch.ones_like(scales[..., -2])",
    ): "of what is like, the form alone is read",
    (
        "decompclip/operators/noise.py",
        "return Weights(heads, stream[..., 0, :], one)",
        "return Weights(heads, stream[..., 1, :], one)",
    ): "the stream counts alike behind every layer",
    (
        "decompclip/operators/patching.py",
        "varies = both.std(dim=1) > 1e-5 * both.abs().amax(1)",
        "varies = both.std(dim=1) > 2e-05 * both.abs().amax(1)",
    ): TINY,
    (
        "decompclip/operators/patching.py",
        "varies = both.std(dim=1) > 1e-5 * both.abs().amax(1)",
        "varies = both.std(dim=1) >= 1e-5 * both.abs().amax(1)",
    ): "of effects that are all zero the correlation is nan in either way",
    (
        "decompclip/operators/parts.py",
        'return torch.linalg.qr(self.maps.heads.double().mT, mode="r").R.mT',
        "return torch.linalg.qr(self.maps.heads.double().mT).R.mT",
    ): "R is the same beside a Q that nobody reads",
    (
        "decompclip/operators/roles.py",
        "return U[:, S / S[0] > EXACT]",
        "return U[:, S / S[0] >= EXACT]",
    ): TINY,
    (
        "decompclip/operators/probes.py",
        "model = estimator or make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))",
        "model = estimator or make_pipeline(StandardScaler(), LogisticRegression(max_iter=1001))",
    ): "a bound that what converges stays under",
    (
        "decompclip/operators/probes.py",
        "return (self.accuracy - self.chance) / (1 - self.chance).clamp_min(1e-9)",
        "return (self.accuracy - self.chance) / (1 - self.chance).clamp_min(2e-09)",
    ): TINY,
    (
        "decompclip/operators/probes.py",
        "if total <= 1e-20 * size or n <= k:  # all images alike, but for rounding",
        "if total <= 2e-20 * size or n <= k:  # all images alike, but for rounding",
    ): TINY,
    (
        "decompclip/operators/probes.py",
        "along = x @ np.random.default_rng(0).standard_normal(x.shape[1])",
        "along = x @ np.random.default_rng(1).standard_normal(x.shape[1])",
    ): "any line serves",
    (
        "decompclip/operators/retrieval.py",
        "basis = axes[sizes > ALIKE].float()",
        "basis = axes[sizes >= ALIKE].float()",
    ): TINY,
    (
        "decompclip/operators/sweeps.py",
        "first, shared = d[:0], Shared.of(d, moments, classifier)",
        "first, shared = d[:1], Shared.of(d, moments, classifier)",
    ): "of what is held, the form alone is read",
    (
        "decompclip/operators/sweeps.py",
        "return predictions(torch.add(before, change, out=spare))",
        "return predictions(torch.add(before, change))",
    ): "the same sum, in memory of its own",
    (
        "decompclip/operators/second_order.py",
        "self.count, self.length = 0, 0.0",
        "self.count, self.length = 0, 1.0",
    ): "the first batch's weight is one: nothing is left of what was there",
    **{
        ("decompclip/operators/second_order.py", before, before.replace(old, f"{old}=")): ACCIDENT
        for before, old in (
            ("side = torch.where(side.abs() > eps**0.5 * spread**3, side, (mean * direction).sum(1))", ">"),
            ("told = spread > ROUNDING * eps * mean.norm(dim=1).clamp_min(moments.length)", ">"),
        )
    },
    (
        "decompclip/operators/second_order.py",
        "share = (values[:, -1] / square.clamp_min(torch.finfo(square.dtype).tiny)).clamp_max(1) * told",
        "share = (values[:, -1] / square.clamp_min(torch.finfo(square.dtype).tiny)).clamp_max(2) * told",
    ): "past one by rounding alone",
    (
        "decompclip/operators/sweeps.py",
        'if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):',
        'if logits.device.type != "cpu" and logits.dtype in (torch.float32, torch.float64):',
    ): "on the CPU, where tests run, torch's own, which takes longer; on a GPU it fails",
    (
        "decompclip/operators/textspan.py",
        "chosen = (scores >= best * (1 - TIE) - FLOOR * first).int().argmax(1)  # the first of equals",
        "chosen = (scores > best * (1 - TIE) - FLOOR * first).int().argmax(1)  # the first of equals",
    ): ACCIDENT,
    (
        "decompclip/operators/transplant.py",
        "if float(misses.max()) <= SAME.get(features.dtype, 1e-3):",
        "if float(misses.max()) < SAME.get(features.dtype, 1e-3):",
    ): ACCIDENT,
    (
        "decompclip/operators/transplant.py",
        "draws.append(((start + steps) % n).to(device))",
        "draws.append(((start - steps) % n).to(device))",
    ): "steps back are as random as steps forward",
    **{
        ("decompclip/operators/weights.py", "free = products > 1e-9", f"free = products {after}"): TINY
        for after in (">= 1e-9", "> 2e-09")
    },
    (
        "decompclip/operators/weights.py",
        'read, out = (torch.linalg.qr(x, mode="r").R for x in (self.read, self.out))',
        "read, out = (torch.linalg.qr(x).R for x in (self.read, self.out))",
    ): GRAM,
    **{
        (
            "decompclip/operators/weights.py",
            "_, values, vectors = torch.linalg.svd(matrix, full_matrices=False)",
            f"_, values, vectors = torch.linalg.svd(matrix{full})",
        ): "vectors past the rank, of which nothing is kept"
        for full in ("", ", full_matrices=True")
    },
    **{
        ("decompclip/operators/neurons.py", before, before.replace(", dtype=torch.bool", "")): NONZERO
        for before in (
            "layers = torch.zeros(d.n_layers, dtype=torch.bool).index_fill(0, terms.layers.cpu(), True)",
            "named = torch.zeros(visual.cfg.n_layers, dtype=torch.bool).index_fill(0, layers, True)",
        )
    },
}
"""Mutants that mean the same: file, line before, line after, and why."""


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    before: str
    after: str
    source: bytes

    @property
    def key(self) -> tuple[str, str, str]:
        return self.path, self.before, self.after

    def __str__(self) -> str:
        return f"{self.path}:{self.line}\n          - {self.before}\n          + {self.after}"


# Where one can be made

SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
WORDS = {"__repr__", "_repr_html_", "__str__"}
SYMMETRIC = {
    "min",
    "max",
    "torch.equal",
    "maximum",
    "minimum",
    "math.hypot",
    "torch.promote_types",
    "torch.add",
    "transpose",
    "same_model",
    "_check_model",
    "cosine_similarity",
    "cohen_kappa_score",
    "subspace_angles",
    "suppress",
}
GUARDS = {"device", "stable", "strict", "encoding", "stacklevel", "row_height"}
"""Arguments without effect on the CPU (where torch sorts stably), on lists of one length, where text is UTF-8 anyway, and on
what is computed (the line that a warning names, the pixels that a row of a figure takes)."""
SIZES = {"batch_size", "block", "BATCH", "BLOCK", "CACHED", "CHUNK", "KEPT", "READ"}
"""How many are worked on, or kept, at a time: one more by default, or twice as many, changes no number."""

FIRST = {"isinstance", "cast", "warnings.warn", "pieces"}
"""Calls of which the first argument alone is mutated: of the others, types, words, and how much memory a piece may take."""

Edit = tuple[int, int, str]
"""From and to which byte of the file, and what stands there instead."""


class Sites:
    """All edits of a file that change what it computes, not what it says or how it is typed."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.expr | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node: ast.expr) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def walk(self, node: ast.AST, *, top: bool = True) -> Iterator[Edit]:
        """Edits in a node and below it; `top` where it stands outside every function."""
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TypeVar":
            return
        if isinstance(node, ast.keyword) and node.arg in GUARDS:
            return
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in SIZES:
            return
        if isinstance(node, ast.FunctionDef):
            if node.name in WORDS:
                return
            taken = [*node.args.posonlyargs, *node.args.args]
            given = [
                *zip(taken[len(taken) - len(node.args.defaults) :], node.args.defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            defaults = [value for argument, value in given if value and argument.arg not in SIZES]
            below: Sequence[ast.AST] = [*defaults, *node.body]
            top = False
        elif isinstance(node, ast.AnnAssign):
            below = [node.value] if node.value else []
        elif isinstance(node, ast.ClassDef):
            below = list(node.body)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FIRST:
            below = node.args[:1]
        else:
            below = list(ast.iter_child_nodes(node))
        yield from self.here(node, top)
        for child in below:
            yield from self.walk(child, top=top)

    def here(self, node: ast.AST, top: bool) -> Iterator[Edit]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self.between(node.left, node.ops[0], node.comparators[0])
        elif isinstance(node, ast.BinOp) and not (top and isinstance(node.op, ast.BitOr)):
            yield from self.between(node.left, node.op, node.right)
        elif isinstance(node, ast.BoolOp):
            yield from self.between(node.values[0], node.op, node.values[1])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            if isinstance(node.operand, ast.Constant):
                return  # a negative number is changed as a number
            yield (*self.span(node), f"({self.text(node.operand)})")
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield (*self.span(node.test), f"(not ({self.text(node.test)}))")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = node.value
            other = (
                not value
                if isinstance(value, bool)
                else value + 1
                if isinstance(value, int)
                else value * 2 or 1.0
            )
            yield (*self.span(node), repr(other))
        elif isinstance(node, ast.Call):
            yield from self.calls(node)

    def between(self, left: ast.expr, operator: ast.AST, right: ast.expr) -> Iterator[Edit]:
        if type(operator) in SWAPS:
            old, new = SWAPS[type(operator)]
            start, end = self.span(left)[1], self.span(right)[0]
            yield start, end, self.source[start:end].decode().replace(old, new, 1)

    def calls(self, node: ast.Call) -> Iterator[Edit]:
        function = self.text(node.func)
        args, keywords = ([ast.unparse(x) for x in part] for part in (node.args, node.keywords))
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in GUARDS:
                yield (
                    *self.span(node),
                    f"{function}({', '.join([*args, *keywords[:i], *keywords[i + 1 :]])})",
                )
        symmetric = {function, function.rpartition(".")[2]} & SYMMETRIC
        apart = not any(isinstance(x, ast.Starred) for x in node.args[:2]) and not symmetric
        if len(args) > 1 and args[0] != args[1] and apart:
            yield (*self.span(node), f"{function}({', '.join([args[1], args[0], *args[2:], *keywords])})")


def mutants(path: str) -> list[Mutant]:
    """Every mutant of a file."""
    source = (ROOT / path).read_bytes()
    sites, found = Sites(source), {}
    for start, end, text in sites.walk(ast.parse(source)):
        changed = source[:start] + text.encode() + source[end:]
        line = source.count(b"\n", 0, start)
        try:
            ast.parse(changed)
        except SyntaxError:  # a keyword that a comprehension's brackets stood for
            continue
        before = source.splitlines()[line].decode().strip()
        after = changed.splitlines()[line].decode().strip()
        if changed != source:
            found[changed] = Mutant(path, line + 1, before, after, changed)
    return list(found.values())


# What the tests say to it


def test_files(room: Room, folder: Path, path: str | None = None) -> list[str]:
    """The room's test files that lie in a folder: first the one of the changed file's name, then those that import it."""
    found = [
        str(file.relative_to(folder))
        for name in (*room.tests, "tests/test_defaults.py")
        for file in (
            sorted((folder / name).rglob("test_*.py")) if (folder / name).is_dir() else [folder / name]
        )
    ]
    module = (path or "").removesuffix(".py").replace("/", ".")
    own = f"test_{module.rpartition('.')[2]}.py"

    def away(name: str) -> int:
        if Path(name).name == own:
            return 0
        return 1 if f"from {module} import" in (folder / name).read_text(encoding="utf-8") else 2

    return sorted(found, key=away)


class Copy:
    """A copy of the tree, in which mutants are made and undone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def run(self, tests: list[str], limit: float, mutant: Mutant | None = None) -> str:
        """ "passed", "failed", or "timed out"; as the tests are on a mutant, or on the tree as it is."""
        if mutant is None:
            return self._run(tests, limit, write=True)
        target = self.folder / mutant.path
        kept, times = target.read_bytes(), target.stat()
        try:
            target.write_bytes(mutant.source)
            os.utime(target, (time.time(), time.time()))  # no compiled file of the original's fits
            return self._run(tests, limit, write=False)
        finally:
            target.write_bytes(kept)
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _run(self, tests: list[str], limit: float, *, write: bool) -> str:
        child = os.fork()
        if not child:
            self._child(tests, write)
        until = time.monotonic() + limit
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                # 0: all passed; 5: none collected, which is no answer; else a failure or a crash
                return {0: "passed", 5: "none collected"}.get(code, "failed")
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timed out"

    def _child(self, tests: list[str], write: bool) -> None:
        """In the forked process: run pytest in the copy, and end."""
        code = 70
        try:
            os.setsid()
            os.chdir(self.folder)
            log = os.open(self.folder / "mutants.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PYTHONPATH"] = str(self.folder)
            sys.dont_write_bytecode = not write
            for name in [
                name for name in sys.modules if name.partition(".")[0] in ("decompclip", "tests", "analyses")
            ]:
                del sys.modules[name]
            sys.path[:] = [str(self.folder), *(entry for entry in sys.path if entry and Path(entry) != ROOT)]
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not data"]
            code = int(pytest.main([*options, *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)


class Bench:
    """Copies of the tree, lent out one a run."""

    def __init__(self, copies: list[Copy]) -> None:
        self.free: SimpleQueue[Copy] = SimpleQueue()
        for copy in copies:
            self.free.put(copy)

    def unchanged(self, room: Room) -> float:
        """How long a mutant of the room may take: five times what its tests take on the tree as it is, which they must pass."""
        copy, start = self.free.get(), time.monotonic()
        answer, log = copy.run(test_files(room, copy.folder), 3600), copy.folder / "mutants.log"
        if answer != "passed":
            raise SystemExit(f"{room.tests} {answer} without any change:\n{log.read_text()[-3000:]}")
        self.free.put(copy)
        seconds = time.monotonic() - start
        print(f"{', '.join(room.sources)}: the tests pass unchanged, in {seconds:.0f} s", flush=True)
        return 5 * seconds + 30

    def judge(self, mutant: Mutant, room: Room, limit: float) -> str:
        if mutant.key in EQUIVALENT:
            return "equivalent"
        copy, start = self.free.get(), time.monotonic()
        answer = copy.run(test_files(room, copy.folder, mutant.path), limit, mutant)
        self.free.put(copy)
        word = {"failed": "killed", "passed": "SURVIVED"}.get(answer, answer.upper())
        print(f"{word:<9} {time.monotonic() - start:4.0f} s  {mutant}", flush=True)
        return word


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the draws of mutants")
    parser.add_argument("--count", type=int, default=100, help="how many mutants, of each seed")
    parser.add_argument("--room", action="append", choices=list(ROOMS), help="only these parts of the core")
    parser.add_argument("--file", action="append", help="only these files of them")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in HEAVY:
        import_module(name)

    places = {
        str(file.relative_to(ROOT)): room
        for room in options.room or ROOMS
        for pattern in ROOMS[room].sources
        for file in sorted(ROOT.glob(pattern))
    }
    places = {path: room for path, room in places.items() if not options.file or path in options.file}
    everyone = [mutant for path in places for mutant in mutants(path)]
    draws = {
        seed: random.Random(seed).sample(everyone, min(options.count, len(everyone))) for seed in options.seed
    }
    rooms = sorted({places[mutant.path] for drawn in draws.values() for mutant in drawn})
    print(f"{len(everyone)} mutants of {len(places)} files", flush=True)
    killed = judged = 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.workers) as pool:
        bench = Bench([Copy(Path(scratch) / str(i)) for i in range(options.workers)])
        limits = dict(zip(rooms, pool.map(lambda room: bench.unchanged(ROOMS[room]), rooms), strict=True))
        for seed, drawn in draws.items():
            print(f"\nSeed {seed}: {len(drawn)} mutants", flush=True)
            words = pool.map(lambda m: bench.judge(m, ROOMS[places[m.path]], limits[places[m.path]]), drawn)
            counts = Counter(words)
            judged += (these := len(drawn) - counts["equivalent"])
            killed += counts["killed"]
            print(f"{counts['killed']} of {these} killed; {dict(counts)}", flush=True)
    print(f"\n{killed} of {judged} killed: {100 * killed / max(1, judged):.1f} %")
    return int(killed < BAR * judged)


if __name__ == "__main__":
    sys.exit(main())

"""Explore: ask what a model's heads do on some images, in a notebook or in a page that needs nothing.

    explore(model, images)                            in a notebook: a widget
    explore(model, images).save_html("heads.html")    without a kernel: the same view of the texts known by then

All but the texts comes from one decomposition of the images. The view (`explore.js`) asks questions, a kind and what it is
about: `("maps", "a dog", 3)`. Each has one `Answer` of a few kilobytes; a saved page holds the answers to all it may ask.
"""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.data.shapes import Shapes
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import room
from decompclip.decomposition.moments import Moments
from decompclip.display import printable, printable_all
from decompclip.files import write_text
from decompclip.models.clip import HookedCLIP
from decompclip.models.text import WordTokenizer
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.attention import contribution_maps, pictures_of
from decompclip.operators.attribution import attribute
from decompclip.operators.inputs import Images, default_texts, encode_texts, image_batches
from decompclip.operators.retrieval import nearest
from decompclip.operators.textspan import Texts, textspans

if TYPE_CHECKING:
    from decompclip.explorer.widget import ExplorerWidget

INSTALL = "pip install 'decompclip[explore]'"
PICTURE, EXACT = 320, 96
"""Longest side of a picture that is sent to the view, and of one that is sent without loss, pixels."""
NEAREST = 6
"""Images shown of those that a head finds alike."""
WORDS = 6
"""Descriptions shown of a head."""


def explore(
    model: HookedCLIP,
    images: Images,
    *,
    texts: Sequence[str] = (),
    names: Sequence[str] | None = None,
    moments: Moments | None = None,
    descriptions: Texts | None = None,
    batch_size: int = 32,
) -> Explorer:
    """See what each head adds to the similarity of images and texts: maps, words, images alike, effects of ablation.

    In a notebook the last line of a cell shows it, with `pip install 'decompclip[explore]'`; elsewhere `save_html`
    writes it as a page. Image, text, layer and head are chosen there.

    Args:
        model: with its text tower.
        images: as the tower takes them: a tensor, batches, or a source such as `FolderSource`.
        texts: to begin with, each scored by itself; by default the class that the first image is most similar to, where the
            model names classes.
        names: of the images; by default their numbers.
        moments: of other images (`Moments.fit(model, batches, normalize=True, stream=True)`), for the means that ablated
            heads are set to and the variance that words describe; by default of `images`. Causal effects need stream means.
        descriptions: texts that heads are described with, as `textspan` takes them; by default its pool and the
            model's class names, or, of a vocabulary of its own, all words.
        batch_size: of the forward passes.

    Returns:
        What a notebook shows; `save_html` writes it.

    Raises:
        TypeError: no `HookedCLIP`, or a text that is no string.
        ValueError: no images, images of another size, more than fit in memory (the error says how many do), names of
            another number, an empty text, or moments of another model or of terms not normalised.
        MissingTextError: the model was loaded without its text tower.
    """
    if not isinstance(model, HookedCLIP):
        raise TypeError(
            f"expected a HookedCLIP, whose text tower reads what is typed; received {type(model).__name__}; load the "
            "model with decompclip.load"
        )
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts; received the single string {texts!r}; put it into a list")
    return Explorer(model, images, texts, names, moments, descriptions, batch_size)


class Explorer:
    """What `explore` returns. A notebook shows it; `answer` is what the view asks, `widget` is the view's state.

    Attributes:
        decomposition: of the images, with the tokens of all heads; terms of unit features.
        names: of the images.
        texts: asked so far.
    """

    def __init__(
        self,
        model: HookedCLIP,
        images: Images,
        texts: Sequence[str],
        names: Sequence[str] | None,
        moments: Moments | None,
        descriptions: Texts | None,
        batch_size: int,
    ) -> None:
        self.model = model
        self._images, self.decomposition = _decomposed(model, images, batch_size)
        count = len(self.decomposition)
        if names is not None and len(names) != count:
            raise ValueError(f"expected a name for each of {count} images; received {len(names)} names")
        self.names = tuple(f"image {i}" for i in range(count)) if names is None else tuple(map(str, names))
        self._own = moments is None
        self._moments = Moments.of(self.decomposition) if moments is None else moments
        self._moments.check(self.decomposition)
        self._descriptions = descriptions
        self._batch_size = batch_size
        self._along: dict[str, Float[Tensor, " d_embed"]] = {}
        self._answers: dict[tuple[Any, ...], Answer] = {}
        for text in texts or [self._first_text()]:
            self.answer("text", text)

    def __repr__(self) -> str:
        return (
            f"Explorer({self.model.name!r}, {len(self.names)} images, texts: {', '.join(map(repr, self.texts))}; shown in a "
            "notebook, or written by .save_html(path))"
        )

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._along)

    # Questions and answers

    def answer(self, kind: str, *about: Any) -> Answer:
        """What the view shows.

        Args:
            kind, about: one of
                "text", text: what each head and MLP adds to each image's similarity to it;
                "maps", text, image: by patch, of all heads;
                "attention", image: of the pooled row over patches, of all heads;
                "words", layer, head: descriptions by TEXTSPAN;
                "nearest", layer, head: to each image, those whose terms of this head, about their mean, are most alike;
                "ablate", text, layer, head, "direct" or "causal": similarities with the head at its mean.

        Raises:
            IndexError: there is no such image, layer or head.
            TypeError: a text that is no string, or a place that is no whole number.
            ValueError: an unknown kind, or an empty text.
        """
        known: dict[str, tuple[Callable[..., Answer], tuple[str, ...]]] = {
            "text": (self._text, ("text",)),
            "maps": (self._maps, ("text", "image")),
            "attention": (self._attention, ("image",)),
            "words": (self._words, ("layer", "head")),
            "nearest": (self._nearest, ("layer", "head")),
            "ablate": (self._ablate, ("text", "layer", "head", "mode")),
        }
        if kind not in known or len(about) != len(known[kind][1]):
            kinds = "; ".join(f"{name}: {', '.join(rest)}" for name, (_, rest) in known.items())
            raise ValueError(f"expected a question of {kinds}; received {(kind, *about)!r}")
        asked, named = known[kind]
        checked = [self.checked(name, value) for name, value in zip(named, about, strict=True)]
        question = (kind, *checked)
        if question not in self._answers:
            self._answers[question] = asked(*checked)
        return self._answers[question]

    def checked(self, name: str, value: Any) -> Any:
        """What is asked about, as it is kept: a text, an image, a layer, a head, a mode. Raises as `answer`."""
        if name == "text":
            if not isinstance(value, str):
                raise TypeError(f"expected a text as a string; received {value!r}")
            if not value.strip():
                raise ValueError("expected a text; received an empty one; type some words")
            return value.strip()
        if name == "mode":
            if value not in ("direct", "causal"):
                raise ValueError(f"expected an ablation of ('direct', 'causal'); received {value!r}")
            return value
        d = self.decomposition
        size = {"image": len(d), "layer": d.n_layers, "head": d.n_heads}[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected the number of one {name}; received {value!r}")
        if not -size <= value < size:
            raise IndexError(f"expected {name} in 0..{size - 1}; received {value}")
        return value % size

    def _text(self, text: str) -> Answer:
        d = self.decomposition
        with warnings.catch_warnings(record=True) as said:  # the view shows them: nobody sees a kernel's log
            warnings.simplefilter("always")
            self._along[text] = along = encode_texts(self.model, [text]).features[0].to(d.embed)
        found = attribute(d, along, components=heads | mlps)
        of_heads, of_mlps = found.values[..., 0].split([d.n_layers * d.n_heads, d.n_layers], dim=1)
        arrays = {
            "heads": of_heads.unflatten(1, (d.n_layers, -1)),
            "mlps": of_mlps,
            "score": found.score[:, 0],
        }
        return Answer(
            {"notes": [str(one.message) for one in said]}, {n: numbers(x) for n, x in arrays.items()}
        )

    def _direction(self, text: str) -> Float[Tensor, " d_embed"]:
        self.answer("text", text)
        return self._along[text]

    def _maps(self, text: str, image: int) -> Answer:
        along = self._direction(text)
        maps = next(contribution_maps(self.decomposition[image], along[None]))
        return Answer({}, {**shares_of(maps.patches[:, 0]), "prefix": numbers(maps.prefix[:, 0].sum(1))})

    def _attention(self, image: int) -> Answer:
        rows, columns = self.model.cfg.grid
        attention = self.decomposition[image].attention()[0]  # [kept_head token]
        patches = attention[:, -rows * columns :].unflatten(1, (rows, columns))
        return Answer({}, {**shares_of(patches), "prefix": numbers(1 - patches.sum((1, 2)))})

    def _words(self, layer: int, head: int) -> Answer:
        needed = self.decomposition.coords.shape[-1]
        if self._moments.scatter is None or self._moments.count < needed:
            why = (
                f"words need second moments of {needed} images at least, as many as a head has coordinates; these are of "
                f"{self._moments.count}: explore(..., moments=Moments.fit(model, batches, normalize=True))"
            )
            return Answer({"words": [], "why": why}, {})
        span = self._spans[layer, head]
        explained = span.variance_explained.diff(prepend=span.variance_explained.new_zeros(1))
        return Answer({"words": list(span.texts)}, {"explained": numbers(explained)})

    @cached_property
    def _spans(self) -> Any:
        """Of all heads: most of the work is the texts', and is done once."""
        texts = _descriptions(self.model) if self._descriptions is None else self._descriptions
        return textspans(self.model, heads, images=self._moments, texts=texts, n_texts=WORDS)

    def _nearest(self, layer: int, head: int) -> Answer:
        terms = replace(self.decomposition, token_terms=None)  # of which a copy is made
        found = nearest(terms, heads[layer, head], range(len(terms)), k=NEAREST, centred=True)
        images = found.indices.cpu().numpy().astype(np.uint16)
        return Answer({}, {"images": images, "cosines": numbers(found.similarity)})

    def _ablate(self, text: str, layer: int, head: int, mode: str) -> Answer:
        along = self._direction(text)
        if mode == "direct":
            features = MeanAblate(heads[layer, head], self._moments)(self.decomposition).features
        else:
            features = self._causal(layer, head)
        return Answer({}, {"after": numbers(F.normalize(features, dim=-1) @ along)})

    def _causal(self, layer: int, head: int) -> Float[Tensor, "image d_embed"]:
        ablate = MeanAblate(heads[layer, head], self._stream_moments)
        with torch.no_grad(), self.model.hooks(ablate):
            batches = self._images.split(self._batch_size)
            return torch.cat([self.model.encode_image(batch) for batch in batches]).to(
                self.decomposition.embed
            )

    @cached_property
    def _stream_moments(self) -> Moments:
        if not self._own:  # means of other images: never those of the images shown in their place
            return self._moments
        batches = self._images.to(self.model.device, self.model.dtype).split(self._batch_size)
        return Moments.fit(self.model, batches, normalize=True, second=False)

    def _first_text(self) -> str:
        """The class that the first image is most similar to, in the model's first prompt."""
        if not self.model.class_names:
            return "a photo"
        best = (self.model.zero_shot_classifier() @ self.decomposition.features[0]).argmax()
        name = self.model.class_names[int(best)]
        prompt = next((t for t in next(iter(self.model.templates.values()), ()) if t != "{}"), "{}")
        return prompt.replace("{}", name) if isinstance(prompt, str) else prompt(name)

    # Where it is seen

    def about(self) -> dict[str, Any]:
        """What the view needs to begin."""
        d, tokenizer = self.decomposition, self.model.tokenizer
        known = sorted(tokenizer.words) if isinstance(tokenizer, WordTokenizer) else []
        return {
            "model": self.model.name,
            "layers": d.n_layers,
            "heads": d.n_heads,
            "grid": list(self.model.cfg.grid),
            "names": list(self.names),
            "pictures": self._pictures,
            "classes": list(self.model.class_names),
            "vocabulary": known,
            "means": "these images" if self._own else f"{self._moments.count} other images",
        }

    def first(self) -> dict[str, Any]:
        """What is chosen to begin with: the head that adds most to the first image's similarity to the first text."""
        text = self.texts[0]
        head = int(self.answer("text", text).arrays["heads"][0].argmax())
        layer, head = divmod(head, self.decomposition.n_heads)
        return {"texts": list(self.texts), "text": text, "image": 0, "layer": layer, "head": head}

    @cached_property
    def _pictures(self) -> list[str]:
        from decompclip.figures.heatmaps import picture_uri

        pixels = pictures_of(self.model, self._images)
        assert pixels is not None
        return [picture_uri(one.numpy(), small=PICTURE, exact=EXACT) for one in pixels]

    @cached_property
    def widget(self) -> ExplorerWidget:
        """The view's state; `widget.text`, `image`, `layer` and `head` can be read and set.

        Raises:
            ImportError: anywidget is not installed.
        """
        try:
            from decompclip.explorer.widget import ExplorerWidget
        except ImportError as error:
            raise ImportError(
                f"expected anywidget, which is not installed: {INSTALL}; or write a page: .save_html(path)"
            ) from error
        return ExplorerWidget(self)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget; without anywidget a saved page, which says what to install."""
        try:
            return self.widget._repr_mimebundle_(**options)
        except ImportError:
            page = self.html(note=f"A saved page: for texts of your own, {INSTALL} and run the cell again.")
            frame = f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts" style="width: 100%; height: 900px; border: 0"></iframe>'
            return {"text/html": frame, "text/plain": repr(self)}

    def save_html(self, path: str | Path) -> Path:
        """Write a page that opens anywhere, without a network or a kernel; returns its path.

        It begins with what is chosen in the widget. Image, layer and head can be chosen in it, and of the texts those in
        `texts`. Of causal effects it has those that were asked for.
        """
        return write_text(Path(path), self.html())

    def html(self, *, note: str = "") -> str:
        """What `save_html` writes, with a note above all else."""
        said = (
            note
            or "A saved page: of texts, those below. For others run explore(model, images) in a notebook."
        )
        shown = vars(self).get("widget")  # what is chosen there, if it was ever shown
        chosen = {name: getattr(shown, name) for name in self.first()} if shown else self.first()
        state = chosen | {"about": self.about() | {"saved": said}}
        for question in self._asked_by_a_page():
            self.answer(*question)
        return page(self.model.name, state, [[q, answer.written()] for q, answer in self._answers.items()])

    def _asked_by_a_page(self) -> Iterator[tuple[Any, ...]]:
        d = self.decomposition
        places = [(layer, head) for layer in range(d.n_layers) for head in range(d.n_heads)]
        for image in range(len(d)):
            yield "attention", image
            yield from (("maps", text, image) for text in self.texts)
        for place in places:
            yield "words", *place
            yield "nearest", *place
            yield from (("ablate", text, *place, "direct") for text in self.texts)


def _descriptions(model: HookedCLIP) -> Sequence[str]:
    """What of a pool the model has words for: of a vocabulary of its own, beside the Shapes world's, all of it."""
    own = model.tokenizer.words if isinstance(model.tokenizer, WordTokenizer) else ()
    if not own or (model.class_names and set(model.class_names) <= set(Shapes(1).class_names)):
        return tuple(dict.fromkeys([*default_texts(model), *model.class_names]))
    return tuple(dict.fromkeys([*model.class_names, *(word for word in own if len(word) > 2)]))


def _decomposed(model: HookedCLIP, images: Images, batch_size: int) -> tuple[Tensor, Decomposition]:
    """The images and their terms with the tokens of all heads, as long as they fit in memory."""
    given, parts, fit = [], [], 0
    budget = room(model.device)
    total = len(images) if isinstance(images, Tensor) else 0  # of others it shows in reading
    with torch.no_grad():
        for batch in image_batches(images, batch_size=batch_size, device=model.device):
            needed = max(total, sum(map(len, given)) + len(batch))
            if parts and needed > fit:
                raise ValueError(
                    f"expected at most {fit} images, whose tokens take {budget / 2**20:.0f} MiB, a quarter of the memory "
                    f"at hand; received {needed}{'' if total else ' or more'}; pass fewer, images[:{fit}]"
                )
            parts.append(model.decompose(batch, normalize=True, tokens=True))
            given.append(batch.detach().cpu())
            if len(parts) == 1:
                size = _bytes(parts[0]) // len(batch) + batch[0].numel() * batch.element_size()
                fit = max(len(batch), int(budget // size))
    if not parts:
        raise ValueError("expected at least one image; received none; check the image source")
    return torch.cat(given), Decomposition.cat(parts)


def _bytes(d: Decomposition) -> int:
    """Of a batch's own tensors."""
    held = [getattr(x, f.name) for x in (d, d.token_terms) if x is not None for f in fields(x)]
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


@dataclass(frozen=True, eq=False)
class Answer:
    """What the view shows of one question: facts that go through JSON, and arrays.

    Maps are in 8 bits, a share of the head's largest patch, whose size stands beside them.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def described(self) -> dict[str, Any]:
        """Facts, and name, type and shape of each array; their bytes go apart."""
        return {**self.facts, "arrays": [[name, x.dtype.name, x.shape] for name, x in self.arrays.items()]}

    def written(self) -> dict[str, Any]:
        """All of it as JSON."""
        arrays = [
            [n, x.dtype.name, x.shape, base64.b64encode(x.tobytes()).decode()] for n, x in self.arrays.items()
        ]
        return {**self.facts, "arrays": arrays}


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def shares_of(patches: Float[Tensor, "head rows columns"]) -> dict[str, np.ndarray]:
    """Maps in 8 bits, as shares of each head's largest patch."""
    largest = patches.abs().amax((1, 2))
    shares = (127 * patches / largest.clamp_min(torch.finfo(patches.dtype).tiny)[:, None, None]).round()
    return {"patches": shares.to(torch.int8).flatten(1).cpu().numpy(), "largest": numbers(largest)}


def _text(name: str) -> str:
    return (files("decompclip.explorer") / name).read_text(encoding="utf-8")


JS, CSS = _text("explore.js"), _text("explore.css")


def page(title: str, state: Mapping[str, Any], answers: Sequence[Sequence[Any]]) -> str:
    """One HTML file with everything in it: nothing is fetched, and only this script may run."""
    from decompclip.figures.theme import content_policy

    script = f"{JS}\nopenSaved(document);\n"
    data = json.dumps(
        printable_all({"state": state, "answers": answers}), separators=(",", ":"), allow_nan=False
    )
    parts = {
        "policy": escape(content_policy(styles=[CSS], scripts=[script])),
        "title": escape(printable(title)),
        "css": CSS,
        "data": data.replace("<", "\\u003c"),
        "script": script,
    }
    return _text("page.html").format(**parts)

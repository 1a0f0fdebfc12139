"""What the explorer answers, beside plain references; what it saves; what it refuses."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

import decompclip
from decompclip import MeanAblate, Moments, attention_maps, contribution_maps, explore, heads, textspan
from decompclip.data.shapes import Shapes, ShapesSource
from decompclip.explorer import explore as home
from decompclip.explorer.explore import EXACT, PICTURE, Answer, Explorer
from decompclip.figures.heatmaps import picture_uri
from decompclip.models.clip import HookedCLIP
from tests.explorer.conftest import EVIL
from tests.models.reduced_towers import fill, reduced

LAYER, HEAD, IMAGE, TEXT = 4, 3, 7, "a star"


def close(ours: np.ndarray, theirs: torch.Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(torch.from_numpy(ours), theirs.float(), atol=within, rtol=0)


def written(answer: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an answer as a page has them."""
    return {
        name: np.frombuffer(base64.b64decode(text), kind).reshape(shape)
        for name, kind, shape, text in answer["arrays"]
    }


def saved(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="saved">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_terms_of_a_text_are_dot_products_and_sum_to_the_cosine(explorer: Explorer) -> None:
    model, d = explorer.model, explorer.decomposition
    found = explorer.answer("text", TEXT).arrays
    along = model.encode_text(TEXT, normalize=True)[0].detach()
    close(found["heads"], d.heads @ along)
    close(found["mlps"], d.mlps @ along)
    rest = (d.embed + d.bias) @ along
    close(found["heads"].sum((1, 2)) + found["mlps"].sum(1), torch.from_numpy(found["score"]) - rest)
    close(found["score"], model.encode_image(explorer._images, normalize=True).detach() @ along)


def test_maps_are_contribution_and_attention_maps_in_8_bits(explorer: Explorer) -> None:
    picture = explorer._images[IMAGE : IMAGE + 1]
    for found, maps in (
        (explorer.answer("maps", TEXT, IMAGE), contribution_maps(explorer.model, picture, TEXT)),
        (explorer.answer("attention", IMAGE), attention_maps(explorer.model, picture)),
    ):
        largest = found.arrays["largest"]
        close(largest, maps.top)
        shares = found.arrays["patches"].reshape(maps.patches[:, 0].shape)
        assert np.abs(shares).max((1, 2)).min() == 127
        misses = np.abs(shares * largest[:, None, None] / 127 - maps.patches[:, 0].numpy()).max((1, 2))
        assert (misses <= largest / 253).all()
        close(found.arrays["prefix"], maps.prefix[:, 0].sum(1))


def test_words_are_those_of_textspan(explorer: Explorer) -> None:
    found = explorer.answer("words", -1, 2)
    pool = tuple(dict.fromkeys([*home.default_texts(explorer.model), *explorer.model.class_names]))
    span = textspan(explorer.model, -1, 2, images=explorer.decomposition, texts=pool, n_texts=home.WORDS)
    assert found.facts["words"] == list(span.texts)
    close(found.arrays["explained"].cumsum(), span.variance_explained)


def test_heads_are_described_in_words_that_the_model_knows(model: HookedCLIP) -> None:
    own = decompclip.load("cifar10")
    assert set(own.class_names) < set(home._descriptions(own)) <= {*own.class_names, *own.tokenizer.words}  # pyright: ignore
    assert {"a star", "star"} <= set(home._descriptions(model))


def test_ablations_are_those_of_mean_ablate(explorer: Explorer) -> None:
    model, d = explorer.model, explorer.decomposition
    along = model.encode_text(TEXT, normalize=True)[0].detach()
    terms = d.heads[:, LAYER, HEAD]
    direct = d.features - terms + terms.mean(0)
    close(
        explorer.answer("ablate", TEXT, LAYER, HEAD, "direct").arrays["after"],
        F.normalize(direct, dim=1) @ along,
    )
    with torch.no_grad(), model.hooks(MeanAblate(heads[LAYER, HEAD], Moments.fit(model, [explorer._images]))):
        causal = model.encode_image(explorer._images, normalize=True)
    close(explorer.answer("ablate", TEXT, LAYER, HEAD, "causal").arrays["after"], causal @ along)


def test_the_nearest_have_the_most_similar_terms(explorer: Explorer) -> None:
    found = explorer.answer("nearest", LAYER, HEAD).arrays
    terms = explorer.decomposition.heads[:, LAYER, HEAD]
    terms = F.normalize(terms - terms.mean(0), dim=1)
    for image, (others, cosines) in enumerate(zip(found["images"], found["cosines"], strict=True)):
        alike = terms @ terms[image]
        alike[image] = -2
        order = alike.argsort(descending=True)[: home.NEAREST]
        assert others.tolist() == order.tolist()
        close(cosines, alike[order])


def test_it_begins_with_the_head_that_adds_most(explorer: Explorer) -> None:
    first = explorer.first()
    adds = explorer.answer("text", first["text"]).arrays["heads"][0]
    assert adds[first["layer"], first["head"]] == adds.max()
    assert (first["text"], first["image"], first["texts"]) == (TEXT, 0, ["a star", "a red ring"])


def test_places_count_from_the_end_and_answers_are_kept(explorer: Explorer) -> None:
    last = explorer.decomposition.n_layers - 1
    assert explorer.answer("words", -1, 2) is explorer.answer("words", last, 2)
    assert explorer.answer("text", " a star ") is explorer.answer("text", "a star")


def test_a_source_gives_what_a_tensor_gives(model: HookedCLIP) -> None:
    world = Shapes(9, seed=5)
    ours = explore(model, ShapesSource(world, model.normalize), batch_size=4)
    theirs = explore(model, model.normalize(world.draw(range(9)).images))
    assert ours.texts == theirs.texts and ours.texts[0].split()[-1] in model.class_names
    np.testing.assert_allclose(
        ours.answer("text", TEXT).arrays["heads"], theirs.answer("text", TEXT).arrays["heads"], atol=1e-6
    )


def test_moments_of_other_images_are_means_and_words(model: HookedCLIP) -> None:
    images = model.normalize(Shapes(200, seed=9).draw(range(200)).images)
    moments = Moments.fit(model, [images[4:]], normalize=True)
    found = explore(model, images[:4], texts=[TEXT], moments=moments, descriptions=["a ring", "red", "small"])
    span = textspan(model, 5, 1, images=moments, texts=["a ring", "red", "small"], n_texts=home.WORDS)
    assert found.answer("words", 5, 1).facts["words"] == list(span.texts)
    edit, along = MeanAblate(heads[5, 1], moments), model.encode_text(TEXT, normalize=True)[0].detach()
    after = F.normalize(edit(found.decomposition).features, dim=1) @ along
    close(found.answer("ablate", TEXT, 5, 1, "direct").arrays["after"], after)
    assert "196 other images" in found.about()["means"]


def test_causal_means_are_those_of_the_given_moments(model: HookedCLIP) -> None:
    images = model.normalize(Shapes(40, seed=9).draw(range(40)).images)
    of_terms, of_streams = (
        Moments.fit(model, [images[4:]], normalize=True, stream=stream) for stream in (False, True)
    )
    with pytest.raises(ValueError, match=r"stream means.*Moments.fit\(model, batches, stream=True\)"):
        explore(model, images[:4], texts=[TEXT], moments=of_terms).answer("ablate", TEXT, 5, 1, "causal")
    found = explore(model, images[:4], texts=[TEXT], moments=of_streams).answer(
        "ablate", TEXT, 5, 1, "causal"
    )
    with torch.no_grad(), model.hooks(MeanAblate(heads[5, 1], of_streams)):
        features = model.encode_image(images[:4], normalize=True)
    close(found.arrays["after"], features @ model.encode_text(TEXT, normalize=True)[0].detach())


def test_too_few_images_for_words_say_so(model: HookedCLIP) -> None:
    found = explore(model, model.normalize(Shapes(1, seed=9).draw([0]).images), texts=[TEXT])
    assert "words need" in found.answer("words", 0, 0).facts["why"]
    assert found.answer("nearest", 0, 0).arrays["images"].shape == (1, 0)
    assert saved(found.html())["answers"]


def test_an_attention_pool_has_maps_too() -> None:
    name = "PE-Core-L-14-336"
    with reduced(name):
        source: Any = open_clip.create_model(name)
    fill(source, torch.Generator().manual_seed(0))
    tokens = lambda texts: torch.tensor([[len(text)] * source.context_length for text in texts])  # noqa: E731
    model = HookedCLIP.from_open_clip(source, tokenizer=tokens)
    images = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    found = explore(model, images)
    assert found.texts == ("a photo",)
    terms, d = found.answer("text", "a dog").arrays, found.decomposition
    along = F.normalize(model.encode_text("a dog")[0].detach(), dim=0)
    close(terms["heads"], d.heads @ along)
    maps = found.answer("maps", "a dog", 1).arrays
    largest = maps["largest"]
    sums = (maps["patches"].sum(1) * largest / 127).reshape(terms["heads"][1].shape) + maps["prefix"].reshape(
        d.n_layers, -1
    )
    assert np.abs(sums - terms["heads"][1]).max() <= 6 * largest.max() / 253
    assert saved(found.html())["state"]["about"]["grid"] == [3, 2]


# Pages


def test_a_page_has_the_answers_and_nothing_else_runs_or_loads(explorer: Explorer, tmp_path: Path) -> None:
    explorer.answer("ablate", TEXT, LAYER, HEAD, "causal")
    path = explorer.save_html(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    found = saved(page)
    asked = {json.dumps(question): answer for question, answer in found["answers"]}
    n_heads = explorer.decomposition.coords[0, :, :, 0].numel()
    assert len(asked) >= 2 + 3 * 20 + 4 * n_heads
    for question in (
        ["text", TEXT],
        ["maps", TEXT, IMAGE],
        ["nearest", LAYER, HEAD],
        ["ablate", TEXT, LAYER, HEAD, "causal"],
    ):
        ours = written(asked[json.dumps(question)])
        for name, values in explorer.answer(*question).arrays.items():
            np.testing.assert_array_equal(ours[name], values)
    assert found["state"] | {"about": None} == explorer.first() | {"about": None}
    assert page.count("<script") == 2 and "</script><img" not in page  # a name's markup is no markup
    assert not re.search(r"(src|href|import|url)\W+https?:", page)
    assert "default-src &#x27;none&#x27;" in page
    assert len(page) < 1_000_000


def test_pictures_are_the_images(explorer: Explorer) -> None:
    from io import BytesIO

    from decompclip.data.files import open_rgb

    uri = explorer.about()["pictures"][IMAGE]
    with open_rgb(BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        pixels = np.asarray(picture)
    expected = (
        255 * explorer.model.denormalize(explorer._images[IMAGE : IMAGE + 1])[0].permute(1, 2, 0).numpy()
    )
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-3


def test_large_pictures_are_made_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (448, 448, 3), dtype=np.uint8)
    sent = picture_uri(noise, small=PICTURE, exact=EXACT)
    assert sent.startswith("data:image/jpeg;base64,") and len(sent) < 120_000


# The widget's state and messages


def asked(explorer: Explorer, *question: Any) -> tuple[dict[str, Any], list[memoryview]]:
    """A question as the view sends it, and what comes back."""
    sent = []
    widget = explorer.widget
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    widget._handle_custom_msg({"id": 3, "question": list(question)}, [])
    (message,) = sent
    return message


def test_a_question_is_answered_in_buffers(explorer: Explorer) -> None:
    pytest.importorskip("anywidget", reason="needs anywidget: pip install 'decompclip[explore]'")
    content, buffers = asked(explorer, "maps", "a red ring", IMAGE)
    assert content["id"] == 3
    for (name, kind, shape), data in zip(content["answer"]["arrays"], buffers, strict=True):
        values = explorer.answer("maps", "a red ring", IMAGE).arrays[name]
        np.testing.assert_array_equal(np.frombuffer(data, kind).reshape(shape), values)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (("text", ["a", "b"]), "expected a text as a string; received ['a', 'b']"),
        (("text", "  "), "expected a text; received an empty one"),
        (("words", 0, 99), "expected head in 0..7; received 99"),
        (("words", 6, 0), "expected layer in 0..5; received 6"),
        (("maps", TEXT, 20), "expected image in 0..19; received 20"),
        (("maps", TEXT, 1.5), "expected the number of one image; received 1.5"),
        (("ablate", TEXT, 0, 0, "partly"), "expected an ablation of ('direct', 'causal')"),
        (("colour", 1), "expected a question of text: text; maps: text, image"),
        (("maps", TEXT), "expected a question of"),
    ],
)
def test_what_cannot_be_answered_is_said_in_the_view(
    explorer: Explorer, question: tuple[Any, ...], message: str
) -> None:
    pytest.importorskip("anywidget", reason="needs anywidget: pip install 'decompclip[explore]'")
    content, buffers = asked(explorer, *question)
    assert message in content["error"] and buffers is None


def test_words_that_a_small_vocabulary_lacks_are_named(explorer: Explorer) -> None:
    (note,) = explorer.answer("text", "a star upon a unicorn").facts["notes"]
    assert "unicorn" in note and "star" not in note.split("'unicorn'")[0]
    assert "star" in explorer.about()["vocabulary"]


def test_what_is_chosen_is_read_and_set(model: HookedCLIP) -> None:
    traitlets = pytest.importorskip("traitlets", reason="needs anywidget: pip install 'decompclip[explore]'")
    found = explore(model, model.normalize(Shapes(3, seed=1).draw(range(3)).images), texts=[TEXT])
    widget = found.widget
    widget.layer, widget.head, widget.image, widget.text = 2, -1, 1, "a blue square"
    assert (widget.layer, widget.head, widget.image) == (2, 7, 1)
    assert widget.texts == [TEXT, "a blue square"]
    state = saved(found.html())["state"]
    assert {name: state[name] for name in ("layer", "head", "image", "text", "texts")} == {
        name: getattr(widget, name) for name in ("layer", "head", "image", "text", "texts")
    }
    for name, value, message in (("head", 8, "0..7"), ("image", -4, "0..2"), ("text", " ", "empty")):
        with pytest.raises(traitlets.TraitError, match=message):
            setattr(widget, name, value)


def test_a_notebook_shows_the_widget(explorer: Explorer) -> None:
    pytest.importorskip("anywidget", reason="needs anywidget: pip install 'decompclip[explore]'")
    shown = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in (shown[0] if isinstance(shown, tuple) else shown)
    assert "20 images" in repr(explorer) and ".save_html" in repr(explorer)


def test_without_anywidget_a_page_says_what_to_install(
    model: HookedCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "decompclip.explorer.widget", raising=False)
    found = explore(model, model.normalize(Shapes(2, seed=1).draw(range(2)).images), texts=[TEXT])
    with pytest.raises(ImportError, match=re.escape("pip install 'decompclip[explore]'")):
        found.widget
    shown = found._repr_mimebundle_()
    assert shown["text/html"].startswith("<iframe srcdoc=") and "pip install" in shown["text/html"]
    assert "Explorer('shapes-badnet', 2 images" in shown["text/plain"]


# Refused

Make = Callable[[HookedCLIP, torch.Tensor], object]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, x: explore(m.visual, x), TypeError, "expected a HookedCLIP.*received HookedViT"),
        (lambda m, x: explore(m, x[:0]), ValueError, "expected at least one image; received none"),
        (lambda m, x: explore(m, []), ValueError, "expected at least one image; received none"),
        (
            lambda m, x: explore(m, x[:, :, :32, :32]),
            ValueError,
            r"expected images .*48, 48\], got \[3, 3, 32, 32\]",
        ),
        (lambda m, x: explore(m, x[0]), ValueError, r"expected batches of images .*received \[3, 48, 48\]"),
        (lambda m, x: explore(m, x.byte()), ValueError, "expected floating-point images"),
        (
            lambda m, x: explore(m, x, texts="a star"),
            TypeError,
            "expected a list of texts; received the single string",
        ),
        (
            lambda m, x: explore(m, x, texts=cast(Any, [3])),
            TypeError,
            "expected a text as a string; received 3",
        ),
        (lambda m, x: explore(m, x, texts=[""]), ValueError, "expected a text; received an empty one"),
        (
            lambda m, x: explore(m, x, names=["one"]),
            ValueError,
            "expected a name for each of 3 images; received 1",
        ),
        (lambda m, x: explore(m, x, moments=Moments.fit(m, [x])), ValueError, "normalize=False"),
        (
            lambda m, x: explore(m, x, batch_size=0),
            ValueError,
            "expected batch_size to be a whole number of images, at least 1",
        ),
    ],
)
def test_a_mistake_is_named(model: HookedCLIP, make: Make, error: type[Exception], message: str) -> None:
    images = model.normalize(Shapes(3, seed=1).draw(range(3)).images)
    with pytest.raises(error, match=message):
        make(model, images)


def test_a_model_without_its_text_tower_is_refused(model: HookedCLIP, tmp_path: Path) -> None:
    from decompclip.models.text import MissingTextError

    decompclip.save_model(model, tmp_path)
    alone = decompclip.load(str(tmp_path), text=False)
    with pytest.raises(MissingTextError, match="no text tower"):
        explore(alone, model.normalize(Shapes(1, seed=1).draw([0]).images), texts=[TEXT])


def test_pixels_that_were_not_normalised_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="model.normalize"):
        explore(decompclip.load("shapes"), Shapes(3, seed=1).draw(range(3)).images, texts=[TEXT])


def test_more_images_than_fit_are_refused_with_their_number(
    model: HookedCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = model.normalize(Shapes(12, seed=1).draw(range(12)).images)
    d = model.decompose(images[:4], normalize=True, tokens=True)
    size = home._bytes(d) // 4 + images[0].nbytes
    monkeypatch.setattr(home, "room", lambda device: 7 * size + size // 2)
    with pytest.raises(ValueError, match=r"expected at most 7 images.*received 12; pass fewer, images\[:7\]"):
        explore(model, images, batch_size=4)
    with pytest.raises(ValueError, match=r"expected at most 7 images.*received 8 or more"):
        explore(model, iter(images.split(4)), batch_size=4)
    assert len(explore(model, images[:7], texts=[TEXT], batch_size=4).names) == 7


def test_an_answer_is_described_without_its_bytes() -> None:
    answer = Answer({"notes": []}, {"after": np.zeros((2, 3), np.float32)})
    assert answer.described() == {"notes": [], "arrays": [["after", "float32", (2, 3)]]}
    assert EVIL.startswith("</script>")

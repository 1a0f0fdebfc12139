"""Pairs into WebDataset shards, so that any CLIP training code can read them."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from decompclip.data.pairs import Pair
from decompclip.files import atomic_write


def write_shards(
    pairs: Iterable[Pair], folder: str | Path, *, per_shard: int = 1000, resume: bool = False
) -> list[Path]:
    """Write `00000.tar`, `00001.tar`, ... with `KEY.png`, `KEY.txt`, `KEY.json` (the pair's id) and, where known, `KEY.cls`.

    Images are kept in 8 bits without loss; equal pairs give equal bytes. A shard appears under its name when it is
    whole.

    Args:
        per_shard: pairs in each.
        resume: the folder's shards are of these pairs, as a killed run left them: they stay, and those that lack are added.

    Raises:
        FileExistsError: there are shards in the folder already, and they are not to be kept.
        ValueError: no pairs, or fewer than one a shard.
    """
    folder = Path(folder)
    if per_shard < 1:
        raise ValueError(f"expected at least 1 pair a shard; received {per_shard}")
    if not resume and (found := sorted(folder.glob("*.tar"))):
        raise FileExistsError(
            f"expected a folder without shards; {folder} holds {found[0].name}; name another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(pairs)
    shards: list[Path] = []
    while part := list(itertools.islice(numbered, per_shard)):
        path = folder / f"{len(shards):05d}.tar"
        shards.append(path)
        if path.exists():  # whole, or it would not be there
            continue
        with (
            atomic_write(path) as partial,
            tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for number, pair in part:
                for kind, content in _files(pair):
                    member = tarfile.TarInfo(f"{number:09d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    if not shards:
        raise ValueError("expected pairs to write; received none")
    return shards


def _files(pair: Pair) -> Iterator[tuple[str, bytes]]:
    yield "png", encode_png(pair.image)
    yield "txt", pair.caption.encode()
    if pair.label is not None:
        yield "cls", str(pair.label).encode()
    yield "json", json.dumps({"id": pair.id}).encode()


def encode_png(image: Float[Tensor, "3 h w"]) -> bytes:
    """Pixels in [0, 1] as a PNG file of 8 bits a channel."""
    pixels = (image.detach().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()

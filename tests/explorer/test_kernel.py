"""The widget in a running kernel, asked over messages as a notebook asks."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decompclip.explorer.explore import Explorer
from tests.test_architecture import ROOT

pytest.importorskip("anywidget", reason="needs anywidget: pip install 'decompclip[explore]'")
pytest.importorskip("ipykernel", reason="needs a kernel: pip install ipykernel")
manager = pytest.importorskip(
    "jupyter_client.manager", reason="needs a kernel's client: pip install ipykernel"
)

CELL = """
from decompclip import Shapes, explore, load
model = load("shapes-badnet")
found = explore(model, model.normalize(Shapes(20, seed=3).draw(range(20)).images), texts=["a star"])
found
"""


def heard(client: Any, of: str, kind: str) -> dict[str, Any]:
    """The next message of a kind that answers a request; an error of the kernel fails the test."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        message = client.get_iopub_msg(timeout=240)
        if message["parent_header"].get("msg_id") != of:
            continue
        assert message["msg_type"] != "error", "\n".join(message["content"]["traceback"])
        if message["msg_type"] == kind:
            return message
    raise AssertionError(f"the kernel sent no {kind}")


def test_a_kernel_shows_the_widget_and_answers_it(explorer: Explorer, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path)}
    kernel, client = manager.start_new_kernel(env=environment, startup_timeout=240)
    try:
        shown = heard(client, client.execute(CELL), "execute_result")["content"]["data"]
        comm = shown["application/vnd.jupyter.widget-view+json"]["model_id"]

        def ask(*question: Any) -> dict[str, Any]:
            data = {"method": "custom", "content": {"id": 1, "question": question}}
            message = client.session.msg("comm_msg", {"comm_id": comm, "data": data})
            client.shell_channel.send(message)
            return heard(client, message["header"]["msg_id"], "comm_msg")

        found = ask("maps", "a blue square", 4)
        expected = explorer.answer("maps", "a blue square", 4).arrays
        for (name, kind, shape), data in zip(
            found["content"]["data"]["content"]["answer"]["arrays"], found["buffers"], strict=True
        ):
            values = np.frombuffer(data, kind).reshape(shape)
            np.testing.assert_allclose(values, expected[name], atol=1 if kind == "int8" else 1e-6)
        assert "expected head in 0..7" in ask("words", 0, 8)["content"]["data"]["content"]["error"]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)

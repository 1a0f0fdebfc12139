"""The explorer as an anywidget, for Jupyter, VS Code and Colab. Imported late: it needs anywidget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from decompclip.explorer.explore import CSS, JS

if TYPE_CHECKING:
    from decompclip.explorer.explore import Explorer


class ExplorerWidget(anywidget.AnyWidget):
    """State that the view and Python share, and the view's questions.

    Attributes:
        text, image, layer, head: what is chosen; setting one changes the view.
        texts: asked so far.
    """

    _esm = JS
    _css = CSS
    about = traitlets.Dict().tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
    image = traitlets.Int().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    head = traitlets.Int().tag(sync=True)

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        super().__init__(about=explorer.about(), **explorer.first())
        self.on_msg(self._asked)

    def __repr__(self) -> str:
        return repr(self._explorer)

    @traitlets.validate("text", "image", "layer", "head")
    def _there(self, proposal: Any) -> Any:
        name = proposal["trait"].name
        try:
            value = self._explorer.checked(name, proposal["value"])
            if name == "text":
                self._explorer.answer("text", value)
        except (IndexError, TypeError, ValueError) as error:
            raise traitlets.TraitError(str(error)) from error
        return value

    @traitlets.observe("text")
    def _added(self, change: Any) -> None:
        if change["new"] not in self.texts:
            self.texts = [*self.texts, change["new"]]

    def _asked(self, _: object, content: Any, buffers: object) -> None:
        """Answer a question of the view; what cannot be answered is said there, for nobody sees a kernel's log."""
        try:
            answer = self._explorer.answer(*content["question"])
        except Exception as error:
            self.send({"id": content.get("id"), "error": str(error) or type(error).__name__})
        else:
            self.send(
                {"id": content["id"], "answer": answer.described()},
                [memoryview(x.tobytes()) for x in answer.arrays.values()],
            )

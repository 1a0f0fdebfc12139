"""Take a CLIP's image feature apart into heads and MLPs, and audit it for backdoors.

The public names are listed in `__init__.pyi`, once; each is imported when it is first used, so that `import decompclip` is instant.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""``python -m privrec`` is the ``privrec`` command."""

from __future__ import annotations

from privrec.cli import main

if __name__ == "__main__":
    main()

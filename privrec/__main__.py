"""``python -m privrec`` is the ``privrec`` command."""

from __future__ import annotations

from privrec.cli.main import main

if __name__ == "__main__":
    main()

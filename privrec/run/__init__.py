"""The one loop: plan, charge, collect, release, apply, record."""

"""What the scripts share, and the scripts that are run as `python -m so101.NAME`."""

__version__ = "0.19.1"  # pyproject.toml reads it here; tests/test_packaging.py compares the other places

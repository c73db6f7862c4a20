"""What the scripts share, and the scripts that are run as `python -m so101.NAME`."""

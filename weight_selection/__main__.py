"""``python -m weight_selection``."""

from weight_selection.cli import run

if __name__ == "__main__":
    run()

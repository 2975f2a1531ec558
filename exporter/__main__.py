"""`python -m exporter` is the `fp4export` command."""

from exporter.entry import run

if __name__ == "__main__":
    run()

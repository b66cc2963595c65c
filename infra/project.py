"""Where the project lies."""

from pathlib import Path

ROOT = Path(__file__).absolute().parents[2]
"""The folder that a process needs on its path to import hbi: a checkout, or site-packages."""

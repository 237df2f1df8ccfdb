"""The pages of the manual."""

from importlib import resources


def topics() -> tuple[str, ...]:
    """Return the names of the pages."""
    names = (page.name for page in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".md") for name in names if name.endswith(".md")))


def page(topic: str) -> str:
    """Return a page as Markdown."""
    return (resources.files(__name__) / f"{topic}.md").read_text("utf-8")

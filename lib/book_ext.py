"""Local Sphinx extension of the book (`_config.yml`: sphinx.local_extensions): everything a page loads lies beside it.

It tells every kernel of the build that no reader's kernel will follow (BOOK_STATIC), makes the Vega bundle and copies
MathJax out of installed packages, drops the theme's script of icons (its web fonts draw them), and derives the address
of the built pages from the repository's, so that the latter stands in `_config.yml` alone.
"""

from __future__ import annotations

import os
import re
import shutil
from importlib import metadata
from pathlib import Path

STATIC = Path(__file__).parent / "static"


def pages_address(repository: str) -> str:
    """The address of the built pages: https://github.com/OWNER/NAME gives https://OWNER.github.io/NAME/."""
    match = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)", repository)
    return f"https://{match[1]}.github.io/{match[2]}/" if match else ""


def write_assets(app) -> None:
    """Make vega-bundle.js for the installed Altair's Vega-Lite, and copy MathJax's one component with its fonts."""
    import altair
    import vl_convert

    made = Path(app.outdir).parent / "book_assets"
    made.mkdir(parents=True, exist_ok=True)
    version = ".".join(altair.VEGALITE_VERSION.split(".")[:2])
    # The bundle has top-level names such as `n`; inside a function it is a classic script, which file:// may load.
    bundle = vl_convert.javascript_bundle(vl_version=version)
    (made / "vega-bundle.js").write_text("(()=>{" + bundle + "})();", encoding="utf-8")
    package = metadata.distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    fonts = Path("output", "chtml", "fonts")
    (made / "mathjax").mkdir(exist_ok=True)
    shutil.copy(Path(package, "tex-chtml.js"), made / "mathjax")
    shutil.copytree(Path(package, fonts), made / "mathjax" / fonts, dirs_exist_ok=True)
    app.config.html_static_path.extend([str(STATIC), str(made)])


def set_addresses(app, config) -> None:
    """Canonical links and social cards need the pages' address; it follows from repository.url."""
    address = pages_address(config.html_theme_options.get("repository_url", ""))
    config.html_baseurl = config.ogp_site_url = address


def drop_icon_script(app, error) -> None:
    """Blank the 1.5 MB script of icons after the build."""
    if error is None and app.builder.format == "html":
        for script in Path(app.outdir, "_static").rglob("fontawesome.js"):
            script.write_text("/* icons come from the web fonts */", encoding="utf-8")


def setup(app) -> dict[str, bool]:
    """Called by Sphinx."""
    os.environ["BOOK_STATIC"] = "1"  # inherited by every kernel that the build starts
    app.connect("config-inited", set_addresses, priority=900)
    app.connect("builder-inited", write_assets, priority=100)
    app.connect("build-finished", drop_icon_script)
    app.add_js_file("hydrate.js", loading_method="defer")
    app.add_css_file("book.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

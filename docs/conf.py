"""The documentation site: `sphinx-build -W docs FOLDER`, with extra `docs`, torch and Keras.

Pages are Markdown (MyST). The reference comes from the docstrings of the installed package; pages
of measurements include the recorded ones in bench/results.
"""

import importlib.util
import os
import re
import sys
from types import SimpleNamespace

os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it when it is imported

import fusedopt  # noqa: E402

# torch and keras must be installed, as classes derive from theirs; a stub of thinc will do
if importlib.util.find_spec("thinc") is None:
    optimizers = SimpleNamespace(
        Optimizer=object, Adam=lambda learn_rate: None, ADAM_DEFAULTS={"learn_rate": 1e-3}
    )
    registry = SimpleNamespace(optimizers=lambda name: lambda function: function)
    sys.modules["thinc"] = SimpleNamespace(optimizers=optimizers, registry=registry)
    sys.modules["thinc.backends"] = SimpleNamespace(NumpyOps=object)
    import fusedopt.thinc

project = "fusedopt"
copyright = "the fusedopt authors; MIT license"
version = release = fusedopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
nitpicky = True
default_role = "autolink"  # `Adam` is a link where there is such a name, else set in italics

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"no-value": True}
autodoc_typehints = "none"  # docstrings say more
# names in single backticks that have no page: torch's, and those that a rule inherits
nitpick_ignore_regex = [("py:obj", ".*")]
autosummary_generate = False
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_title = "fusedopt"
html_static_path = ["_static"]
html_css_files = ["site.css"]


NAMES = {"README": "steps"}  # of pages whose name in bench/results is another one


def read(app, docname, content):
    """Adapt a page that is written for the repository.

    Links to the recorded pages lead to this site's pages of them.
    """
    up = "../" * docname.count("/")
    content[0] = re.sub(
        r"\]\((?:\.\./)+bench/results/(\w+)\.md",
        lambda found: f"]({up}benchmarks/{NAMES.get(found[1], found[1])}.md",
        content[0],
    )


def setup(app):
    """Register what adapts pages."""
    app.connect("source-read", read)

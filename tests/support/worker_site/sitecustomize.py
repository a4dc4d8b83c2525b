"""Runs at the start of any Python that has this folder in its PYTHONPATH: worker processes of the tests then know a backend without a model."""

from qwen2_local import backends

backends._BACKENDS["scripted"] = ("json", "tests.support.scripted_worker")

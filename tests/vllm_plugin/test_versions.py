"""The version gate and what the package says where vLLM is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helium_proxy import vllm_plugin
from helium_proxy.vllm_plugin.versions import TESTED, UnsupportedVersion, check_version, vllm_version


@pytest.mark.parametrize("version", ["0.30.0", "0.31.0", "0.32.0", "0.32.1", "0.31.0+cpu"])
def test_tested_versions_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.29.0", "0.3.2", "0.33.0rc1", "1.0", "not installed"])
def test_others_are_named_with_the_way_out(version: str) -> None:
    with pytest.raises(UnsupportedVersion) as caught:
        check_version(version)
    for part in (version, "allow_untested_version", *TESTED):
        assert part in str(caught.value)
    check_version(version, allow_untested=True)


@pytest.mark.skipif(vllm_version() != "not installed", reason="vLLM is installed here")
def test_without_vllm_the_import_error_says_what_is_needed() -> None:
    with pytest.raises(ImportError, match=r"works with vLLM 0\.30, .*not installed"):
        _ = vllm_plugin.HeliumConnector


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = vllm_plugin.Other


def test_the_bookkeeping_imports_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules);"
        "import helium_proxy.vllm_plugin.pins, helium_proxy.vllm_plugin.versions;"
        "print([n for n in set(sys.modules) - before"
        " if n.split('.')[0] not in sys.stdlib_module_names | {'helium_proxy'}])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

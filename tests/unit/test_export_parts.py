import pytest

from fastvlm.errors import ExportError
from fastvlm.export.parts import needs


def test_a_module_that_another_version_has_is_named_with_the_version_that_is_needed():
    pytest.importorskip("coremltools", exc_type=ImportError)

    said = (
        r"coremltools is installed, but has no coremltools\.optimize\.nowhere; "
        r"this export needs coremltools[^;]*>=9[^;]*; pip install 'fastvlm\[coreml\]'"
    )
    with pytest.raises(ExportError, match=said):
        needs("coreml", "coremltools.optimize.nowhere._passes")


@pytest.mark.parametrize("module", ["nowhere_to_be_found", "nowhere_to_be_found.inside"])
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(module):
    with pytest.raises(
        ExportError, match=r"needs more packages: .*'nowhere_to_be_found'; pip install 'fastvlm\[gguf\]'"
    ):
        needs("gguf", module)

"""docs/models.md is what the code's table says."""

from pathlib import Path

from flash_mla.hf.models import models_page


def test_the_page_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "models.md"
    assert page.read_text() == models_page(), "run: python -m flash_mla.hf.models > docs/models.md"

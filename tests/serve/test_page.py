"""The page in a headless browser: a problem is asked, the answer and the latents are to be seen."""

from __future__ import annotations

import shutil

import pytest
from serve.running import reasoner_of, running


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_problem_is_asked_and_its_latents_are_shown(scheme: str) -> None:
    from playwright.sync_api import sync_playwright

    reasoner = reasoner_of("latent")
    expected = reasoner.generate("2 + 3", top=3)
    assert expected.num_steps > 1
    with running(reasoner, key="s3cret") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, errors = browser.new_page(color_scheme=scheme), []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda sent: errors.append(sent.url) if "127.0.0.1" not in sent.url else None)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#error:not([hidden])")
        assert "wrong or missing API key" in page.inner_text("#error")
        page.fill("#key", "s3cret")
        page.fill("#top", "3")
        page.fill("#problem", "2 + 3")
        page.click("#ask")
        page.wait_for_selector("#usage:not(:empty)")
        assert page.inner_text("#answer") == expected.answer
        assert page.inner_text("#name") == "tiny" and not page.is_visible("#error")
        cards = page.locator("#latents li").all()
        assert len(cards) == expected.num_steps
        for card, latent in zip(cards, expected.latents, strict=True):
            assert [token.strip() for token in card.locator(".token span:first-of-type").all_inner_texts()] == [
                text for text, _ in latent.tokens
            ]
            bars = card.locator(".token i").all()
            whole = card.locator(".token").first.bounding_box()["width"]
            for bar, (_, weight) in zip(bars, latent.tokens, strict=True):
                assert bar.bounding_box()["width"] == pytest.approx(weight * whole, abs=1.5)
        page.fill("#problem", "1 " * 2000)
        page.click("#ask")
        page.wait_for_selector("#error:not([hidden])")
        assert "expected 1 to" in page.inner_text("#error")
        browser.close()
    assert not errors

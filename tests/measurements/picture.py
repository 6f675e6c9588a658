"""Make the picture of the page, tests/recipes/page.png: python -m tests.measurements.picture"""

import asyncio
import random

from playwright.async_api import async_playwright

from server import RandomBernoulli, WebSocketServer, logger
from tests.recipes.page import HERE, make_page_app
from tests.support import serving, which


async def main() -> None:
    """Serve the page with 500 tosses, and take a picture of it."""
    logger.setLevel("INFO")  # so that `serving` sees the URL
    random.seed(5)
    coin = RandomBernoulli(0.72)
    async with serving(make_page_app()) as url, async_playwright() as playwright:
        WebSocketServer.send_message([coin.sample() for _ in range(500)])
        chromium = which("chromium")
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 800, "height": 100})
        await page.goto(url.removesuffix("websocket").replace("ws:", "http:"))
        await page.get_by_text("500", exact=True).wait_for()
        await page.screenshot(path=HERE / "page.png", full_page=True)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())

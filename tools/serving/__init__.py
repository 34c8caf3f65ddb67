"""The HTTP application that serves images: OpenAI's API, metrics, and a page."""

"""A base on the Hub server."""

from tests.support.publishing import base, published_base  # noqa: F401 - fixtures

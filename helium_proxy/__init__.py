"""helium-proxy: an OpenAI-compatible proxy that treats agent workflows as query plans.

Kept free of imports: the vLLM plugin inside this package is loaded by workers that have none of our
dependencies.
"""

__version__ = "0.1.0"

"""`roster serve` without its interceptors, to measure what these cost."""

from service import server
from service.cli import main
from service.interceptors.chain import Chain, Interceptor
from service.interceptors.messages import Messages


def chain_without_interceptors(*interceptors: Interceptor) -> Chain:
    """Return a chain that only reads messages, without which there would be no calls."""
    return Chain(*(each for each in interceptors if getattr(each, "__func__", None) is Messages.intercept))


if __name__ == "__main__":
    server.Chain = chain_without_interceptors
    main(["serve"])

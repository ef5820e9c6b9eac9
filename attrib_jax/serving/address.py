"""The address that the page listens at."""

import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ValueError where the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"port is {port} at host {host!r}, where the page cannot listen ({error.strerror}): expected a free port "
            "of this machine. Give another --port or --host."
        ) from error
    return listening

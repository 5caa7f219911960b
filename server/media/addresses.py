"""Which network addresses a stranger's URL may send this server to."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

REFUSED: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's metadata service, in public space
        "192.0.0.0/24",  # protocol assignments, Oracle's metadata service among them
        "fec0::/10",  # IPv6 site-local, which the standard library takes for public
        # Addresses that carry an IPv4 address, so that the address checked would not be the one reached.
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
    )
)


def is_public(address: str, allowed: Sequence[Network] = ()) -> bool:
    """Whether ``address`` is public or in one of the ``allowed`` networks; ValueError if it is no IP address.

    Private, shared, loopback, link-local (cloud metadata), multicast, reserved and IPv4-carrying ones are not public.
    """
    ip = ip_address(address)
    if any(ip in network for network in allowed):
        return True
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in REFUSED)

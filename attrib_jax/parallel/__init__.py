"""Devices and hosts: the mesh, sums over devices, what host 0 decides, progress."""

"""Injected pods on a real node: kubelet, containerd and runc, with nothing around them."""

"""What people look at (`k8s/observability`), on real parts and by what a real sidecar says."""

"""A page to chat on and to watch the cluster with: static files, one stream of figures."""

"""The cluster's scheduler over modelled replicas: how a thousand of them would fare."""

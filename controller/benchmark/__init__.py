"""The load generator behind `phalanx bench`: real requests over gRPC, timed by the client."""

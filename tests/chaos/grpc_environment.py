"""The environment of gRPC as each command sets it before it imports gRPC; imported before anything that does."""

from fedpeft.rpc import grpc_core

grpc_core.configure()

"""The console: a federation in a browser, served by a process that speaks gRPC to the server as its user does.

Pages are rendered here, and what changes of them is sent over server-sent events; `app` is the one module that knows
all parts. Needs the extra `console`; imports no torch.
"""

"""Identities: keys, certificates, the authority that issues them, and the tokens that ask for one.

A key is made where it is used and never travels. What is proved is a certificate's; what is in it is a `Subject`.
The cryptography is the `cryptography` package's.
"""

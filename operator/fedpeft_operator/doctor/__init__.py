"""`fedpeft doctor`: checks a set-up, on the server's side or a site's, and says what to do about each fault.

A check is a function from a `Setup` to its findings; `checks.CHECKS` is all of them, in the order they are made. A
check changes nothing but for a small file that it writes and removes where the disk is measured.
"""

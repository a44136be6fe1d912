"""The port where devices enroll: a process of its own between strangers and the daemon, and who watches over it."""

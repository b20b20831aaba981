"""Checks for Ascend NPUs: CANN's library, device addresses and links, time-outs, limits of the library.

Written from documentation and from outputs that users have published; nothing here has run on an NPU. What is not
understood is a finding with the text in it, so that it can be reported.
"""

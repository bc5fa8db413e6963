"""Published kernels written as Programs, so that their predicted time can meet the measured one.

One file a family. A function takes the core and the sizes, and returns the Program. What a public
source does not say (which engine an open instruction ran on, how many buffers the compiler gave a
tile, what it spilled) is a choice; where it was made with the measured values in sight, the
module's docstring ends with "Chosen by looking", which the validation prints.
"""

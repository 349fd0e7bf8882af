"""The published arithmetic of FastDeconv, written plainly: unfold, 3 products a Newton-Schulz step, autograd for the rest."""
import math
import torch, torch.nn.functional as F
from torch import nn


def inverse_square_root(matrix, n_iter):
    "`matrix**-0.5` of a batch (G, F, F) by coupled Newton-Schulz steps, three products each."
    norm = matrix.flatten(1).norm(dim=1)[:, None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    Y, Z = matrix/norm, identity
    for _ in range(n_iter):
        T = 0.5*(3*identity - Z@Y)
        Y, Z = Y@T, T@Z
    return Z/norm.sqrt()


class PlainDeconv(nn.Conv2d):
    "FastDeconv (Ye et al. 2020) as its formula reads; slow, and the measure of the fast one."
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
                 eps=1e-5, n_iter=5, momentum=0.1, block=64, sampling_stride=3):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.eps, self.n_iter, self.momentum, self.sampling_stride = eps, n_iter, momentum, sampling_stride*stride
        self.block = in_channels//groups if groups > 1 else math.gcd(min(block, in_channels), in_channels)
        self.num_features = self.block*kernel_size**2
        self.register_buffer("running_mean", torch.zeros(groups*self.num_features))
        eye = torch.eye(self.num_features)
        self.register_buffer("running_deconv", eye if groups == 1 else eye.repeat(groups, 1, 1))

    def forward(self, x):
        G, F_, R = self.groups, self.num_features, self.in_channels//(self.block*self.groups)
        if self.training:
            if self.kernel_size[0] > 1:
                X = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.sampling_stride).transpose(1, 2).contiguous()
            else: X = x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])[::self.sampling_stride**2]
            if G == 1: X = X.reshape(-1, F_, R).transpose(1, 2).contiguous().view(1, -1, F_)
            else: X = X.reshape(-1, G, F_).transpose(0, 1)
            mean = X.mean(1, keepdim=True)
            X = X - mean
            eye = torch.eye(F_, dtype=X.dtype, device=X.device).expand(G, F_, F_)
            cov = torch.baddbmm(eye, X.transpose(1, 2), X, beta=self.eps, alpha=1/X.shape[1])
            isqrt = inverse_square_root(cov, self.n_iter)
            with torch.no_grad():
                self.running_mean.lerp_(mean.flatten(), self.momentum)
                self.running_deconv.lerp_(isqrt.view_as(self.running_deconv), self.momentum)
        else: mean, isqrt = self.running_mean.view(G, 1, F_), self.running_deconv.view(G, F_, F_)
        w = self.weight.view(G, -1, F_, R).transpose(2, 3).reshape(G, -1, F_) @ isqrt
        b = -(w @ mean.transpose(1, 2)).view(self.out_channels, -1).sum(1)
        if self.bias is not None: b = b + self.bias
        w = w.view(G, -1, R, F_).transpose(2, 3).reshape(self.weight.shape)
        return F.conv2d(x, w, b, self.stride, self.padding, self.dilation, self.groups)

// The encodings that draw from a seed: uniform2, uniform4, uniform8, eden1 to eden4, as the comment of TensorEntry has them.

import { createHash } from "node:crypto";
import { BLOCK, readScales, scalesOf } from "./blocks.js";

const LARGEST = (2 - 2 ** -23) * 2 ** 127;
const CENTROIDS = [
  [0.7979],
  [0.4528, 1.5104],
  [0.2451, 0.756, 1.3439, 2.1519],
  [0.1284, 0.388, 0.6568, 0.9423, 1.2562, 1.618, 2.069, 2.7326],
].map((positive) => [...positive.map((c) => -c).reverse(), ...positive]);

export function seedOf(training, name) {
  const digest = createHash("sha256").update(`${training}\u001fencoding\u001f${name}`).digest();
  return Number((digest.readBigUInt64LE(0) >> 1n) & 0xffffffffn);
}

function bytes(seed, i, count) {
  const text = Buffer.alloc(8);
  text.writeUInt32LE(seed, 0);
  text.writeUInt32LE(i, 4);
  return createHash("shake128", { outputLength: count }).update(text).digest();
}

function pack(codes, bits) {
  const data = Buffer.alloc(Math.ceil((codes.length * bits) / 8));
  codes.forEach((code, i) => {
    for (let bit = 0; bit < bits; bit++) {
      const place = i * bits + bit;
      data[place >>> 3] |= ((code >>> bit) & 1) << (place & 7);
    }
  });
  return data;
}

function unpack(data, n, bits) {
  if (data.length !== Math.ceil((n * bits) / 8)) throw new Error(`${data.length} bytes of codes`);
  const codes = Array.from({ length: n }, (_, i) => {
    let code = 0;
    for (let bit = 0; bit < bits; bit++) code |= ((data[(i * bits + bit) >>> 3] >>> ((i * bits + bit) & 7)) & 1) << bit;
    return code;
  });
  if (!pack(codes, bits).equals(data)) throw new Error("bits beyond the values");
  return codes;
}

function encodeUniform(values, bits, seed) {
  const levels = 2 ** (bits - 1) - 1;
  const scales = scalesOf(values, levels);
  const head = Buffer.alloc(4 * scales.length);
  scales.forEach((scale, i) => head.writeFloatLE(scale, 4 * i));
  let drawn;
  const codes = values.map((value, at) => {
    if (at % 65536 === 0) drawn = bytes(seed, at / 65536, 4 * Math.min(65536, values.length - at));
    const u = drawn.readUInt32LE(4 * (at % 65536)) / 2 ** 32;
    const q = Math.floor(value / scales[Math.floor(at / BLOCK)] + u);
    return Math.min(Math.max(q, -levels), levels) + levels;
  });
  return Buffer.concat([head, pack(codes, bits)]);
}

function decodeUniform(data, n, bits) {
  const levels = 2 ** (bits - 1) - 1;
  const scales = readScales(data, n, levels);
  const codes = unpack(data.subarray(4 * scales.length), n, bits);
  if (codes.some((code) => code > 2 * levels)) throw new Error("a code beyond the levels");
  return codes.map((code, i) => (code - levels) * scales[Math.floor(i / BLOCK)]);
}

function chunkSizes(n) {
  const sizes = new Array(Math.floor(n / 1024)).fill(1024);
  let left = n % 1024;
  for (const size of [512, 256, 128, 64]) {
    if (left < size) continue;
    sizes.push(size);
    left -= size;
  }
  if (left) sizes.push(Math.max(8, 2 ** Math.ceil(Math.log2(left))));
  return sizes;
}

function hadamard(values) {
  let out = values;
  for (let h = 1; h < values.length; h *= 2) {
    const last = out;
    out = last.map((value, i) => (i & h ? last[i - h] - value : value + last[i + h]));
  }
  return out;
}

function sum(values) {
  let left = values;
  while (left.length > 1) {
    const half = left.length / 2;
    left = left.slice(0, half).map((value, k) => value + left[k + half]);
  }
  return left[0];
}

const signsOf = (seed, i, size) => unpack(bytes(seed, i, size / 8), size, 1).map((bit) => (bit ? -1 : 1));

function encodeEden(values, bits, seed) {
  const centroids = CENTROIDS[bits - 1];
  const borders = centroids.slice(1).map((c, i) => (c + centroids[i]) / 2);
  const sizes = chunkSizes(values.length);
  const head = Buffer.alloc(4 + 4 * sizes.length);
  head.writeUInt32LE(seed);
  let at = 0;
  const codes = sizes.flatMap((size, i) => {
    const x = Array.from({ length: size }, (_, k) => values[at + k] ?? 0);
    at += size;
    const signs = signsOf(seed, i, size);
    const r = hadamard(x.map((value, k) => value * signs[k]));
    const square = sum(x.map((value) => value * value));
    const norm = square > 0 ? Math.sqrt(square) : 1;
    const own = r.map((value) => borders.filter((border) => border <= value / norm).length);
    const product = sum(r.map((value, k) => value * centroids[own[k]]));
    head.writeFloatLE(square > 0 ? Math.min(square / product, LARGEST) : 0, 4 + 4 * i);
    return own;
  });
  return Buffer.concat([head, pack(codes, bits)]);
}

function decodeEden(data, n, bits) {
  const sizes = chunkSizes(n);
  const padded = sizes.reduce((total, size) => total + size, 0);
  if (data.length !== 4 + 4 * sizes.length + (padded * bits) / 8) throw new Error(`${data.length} bytes`);
  const seed = data.readUInt32LE(0);
  const codes = unpack(data.subarray(4 + 4 * sizes.length), padded, bits);
  let at = 0;
  const decoded = sizes.flatMap((size, i) => {
    const scale = data.readFloatLE(4 + 4 * i);
    if (!(scale >= 0 && scale <= LARGEST)) throw new Error(`scale ${i} is ${scale}`);
    const signs = signsOf(seed, i, size);
    const c = codes.slice(at, at + size).map((code) => CENTROIDS[bits - 1][code]);
    at += size;
    return hadamard(c).map((value, k) => Math.min(Math.max(value * signs[k] * scale, -LARGEST), LARGEST));
  });
  return decoded.slice(0, n);
}

const family = (encoding) => /^(uniform|eden)(\d)$/.exec(encoding);

export const draws = (encoding) => family(encoding) !== null;

export function encodeDrawn(values, encoding, seed) {
  const [, form, bits] = family(encoding);
  return (form === "eden" ? encodeEden : encodeUniform)(values, Number(bits), seed);
}

export function decodeDrawn(data, n, encoding) {
  const [, form, bits] = family(encoding);
  return Float32Array.from((form === "eden" ? decodeEden : decodeUniform)(data, n, Number(bits)));
}

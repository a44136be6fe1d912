// The encodings of tensor.proto: flat float32 values to bytes and back. Throws on whatever a server must refuse.

import { BLOCK, SMALLEST, exponentOf, readScales, scalesOf } from "./blocks.js";
import { decodeDrawn, draws, encodeDrawn } from "./drawn.js";

const halfEven = (x) => {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && Math.abs(floor % 2) === 1) ? floor + 1 : floor;
};

const bitsOf = (value) => {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, value);
  return view.getUint32(0);
};

const floatOf = (bits) => {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint32(0, bits);
  return view.getFloat32(0);
};

function toHalf(value) {
  const sign = bitsOf(value) >>> 31 ? 0x8000 : 0;
  const magnitude = Math.min(Math.abs(value), 65504);
  if (magnitude === 0) return sign;
  const exponent = Math.max(exponentOf(magnitude), -14);
  return sign | (((exponent + 14) << 10) + halfEven(magnitude / 2 ** (exponent - 10)));
}

function ofHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

function toBrain(value) {
  const bits = bitsOf(value);
  const magnitude = Math.min(bits & 0x7fffffff, 0x7f7f0000);
  const rounded = (magnitude + 0x7fff + ((magnitude >>> 16) & 1)) >>> 16;
  return ((bits >>> 16) & 0x8000) | rounded;
}

const DENSE = {
  float32: { width: 4, narrow: bitsOf, widen: floatOf, exponent: 0x7f800000 },
  float16: { width: 2, narrow: toHalf, widen: ofHalf, exponent: 0x7c00 },
  bfloat16: { width: 2, narrow: toBrain, widen: (bits) => floatOf((bits << 16) >>> 0), exponent: 0x7f80 },
};

const isZero = (bits, width) => (width === 4 ? bits & 0x7fffffff : bits & 0x7fff) === 0;

function writeBits(all, width) {
  const data = Buffer.alloc(all.length * width);
  all.forEach((bits, i) => (width === 4 ? data.writeUInt32LE(bits, 4 * i) : data.writeUInt16LE(bits, 2 * i)));
  return data;
}

function readBits(data, { width, exponent }) {
  if (data.length % width) throw new Error("values that are cut short");
  return Array.from({ length: data.length / width }, (_, i) => {
    const bits = width === 4 ? data.readUInt32LE(4 * i) : data.readUInt16LE(2 * i);
    if ((bits & exponent) === exponent) throw new Error(`value ${i} is not finite`);
    return bits;
  });
}

function encodeInt8(values, nonzero) {
  const scales = scalesOf(values, 127);
  const data = Buffer.alloc(4 * scales.length + values.length);
  scales.forEach((scale, i) => data.writeFloatLE(scale, 4 * i));
  values.forEach((value, i) => {
    const quotient = value / scales[Math.floor(i / BLOCK)];
    const q = Math.sign(value) * Math.min(halfEven(Math.abs(quotient)), 127);
    data.writeInt8(nonzero && q === 0 ? Math.sign(value) : q, 4 * scales.length + i);
  });
  return data;
}

function decodeInt8(data, n) {
  const head = 4 * Math.ceil(n / BLOCK);
  if (data.length !== head + n) throw new Error(`${data.length} bytes`);
  const scales = readScales(data, n, 127);
  scales.forEach((scale, i) => {
    const peak = data.subarray(head + i * BLOCK, head + Math.min(n, (i + 1) * BLOCK)).reduce((most, byte) => Math.max(most, Math.abs((byte << 24) >> 24)), 0);
    if (peak > 127 || (peak < 127 && scale !== SMALLEST)) throw new Error(`the largest byte of block ${i} is ${peak}`);
  });
  return Float32Array.from({ length: n }, (_, i) => data.readInt8(head + i) * scales[Math.floor(i / BLOCK)]);
}

function varint(number) {
  const bytes = [];
  for (; number >= 0x80; number = Math.floor(number / 128)) bytes.push((number % 128) | 0x80);
  return [...bytes, number];
}

function readVarint(data, at) {
  let number = 0;
  for (let taken = 1; taken <= 5; taken++) {
    if (at + taken > data.length) throw new Error("a number that does not end");
    const byte = data[at + taken - 1];
    number += (byte & 0x7f) * 128 ** (taken - 1);
    if (byte < 0x80) {
      if (taken > 1 && byte === 0) throw new Error("a number with more bytes than it needs");
      return [number, at + taken];
    }
  }
  throw new Error("a number of more than 5 bytes");
}

function positionsOf(kept, n) {
  const gaps = [];
  let last = -1;
  for (const position of kept) {
    gaps.push(...varint(position - last - 1));
    last = position;
  }
  if (gaps.length <= Math.ceil(n / 8)) return [0, gaps];
  const mask = new Array(Math.ceil(n / 8)).fill(0);
  for (const position of kept) mask[position >>> 3] |= 1 << (position & 7);
  return [1, mask];
}

// What can stand behind `sparse+`: which values stay, and how they are written and read.
const denseValues = (dense) => ({
  keeps: (value) => !isZero(dense.narrow(value), dense.width),
  write: (values) => writeBits(values.map(dense.narrow), dense.width),
  read: (data) => readBits(data, dense).map(dense.widen),
});
const KEPT = {
  ...Object.fromEntries(Object.entries(DENSE).map(([name, dense]) => [name, denseValues(dense)])),
  int8: { keeps: (value) => value !== 0, write: (values) => encodeInt8(values, true), read: (data, n) => Array.from(decodeInt8(data, n)) },
};

function encodeSparse(values, own) {
  const kept = Array.from(values).flatMap((value, i) => (own.keeps(value) ? [i] : []));
  const [mode, positions] = positionsOf(kept, values.length);
  const head = Buffer.from([mode, ...varint(kept.length), ...positions]);
  return Buffer.concat([head, own.write(kept.map((i) => values[i]))]);
}

function decodeSparse(data, n, own) {
  if (data[0] !== 0 && data[0] !== 1) throw new Error("the mode is neither 0 nor 1");
  let [count, at] = readVarint(data, 1);
  const kept = [];
  if (data[0] === 0) {
    for (let last = -1; kept.length < count; ) {
      let gap;
      [gap, at] = readVarint(data, at);
      kept.push((last += gap + 1));
    }
  } else {
    for (let i = 0; i < 8 * Math.ceil(n / 8); i++) if ((data[at + (i >>> 3)] >>> (i & 7)) & 1) kept.push(i);
    at += Math.ceil(n / 8);
  }
  if (kept.length !== count || kept.some((i) => i >= n)) throw new Error("positions that do not fit");
  const found = own.read(data.subarray(at), count);
  if (found.length !== count || found.some((value) => value === 0)) throw new Error("kept values that do not fit");
  const values = new Float32Array(n);
  kept.forEach((i, k) => (values[i] = found[k]));
  if (!encodeSparse(values, own).equals(data)) throw new Error("the other mode is as short");
  return values;
}

const UNIT = 2 ** -64;
const LAST_SUM = Math.fround(2 ** 33 - 512);

// Sums in units of 2^-64, of which a value of weight 1 is one; a float64 that is no integer is below 2^53.
function encodeSums(values) {
  const data = Buffer.alloc(16 * values.length);
  values.forEach((value, i) => {
    const units = Math.min(Math.max(value, -LAST_SUM), LAST_SUM) / UNIT;
    const sum = BigInt.asUintN(128, BigInt(Number.isInteger(units) ? units : halfEven(units)));
    data.writeBigUInt64LE(sum & 0xffffffffffffffffn, 16 * i);
    data.writeBigUInt64LE(sum >> 64n, 16 * i + 8);
  });
  return data;
}

function decodeSums(data, n) {
  if (data.length !== 16 * n) throw new Error(`${data.length} bytes, not ${16 * n}`);
  return Float32Array.from({ length: n }, (_, i) => {
    const sum = (data.readBigInt64LE(16 * i + 8) << 64n) | data.readBigUInt64LE(16 * i);
    return Number(sum) * UNIT;
  });
}

// `seed` is that of an encoding that draws.
export function encode(values, encoding, seed = 0) {
  if (draws(encoding)) return encodeDrawn(Array.from(values), encoding, seed);
  const [form, kept] = encoding.split("+");
  if (form === "sparse") return encodeSparse(values, KEPT[kept]);
  if (form === "int8") return encodeInt8(Array.from(values), false);
  if (form === "sum128") return encodeSums(Array.from(values));
  return writeBits(Array.from(values, DENSE[form].narrow), DENSE[form].width);
}

export function decode(data, n, encoding) {
  if (draws(encoding)) return decodeDrawn(data, n, encoding);
  const [form, kept] = encoding.split("+");
  if (form === "sparse") return decodeSparse(data, n, KEPT[kept]);
  if (form === "int8") return decodeInt8(data, n);
  if (form === "sum128") return decodeSums(data, n);
  const bits = readBits(data, DENSE[form]);
  if (bits.length !== n) throw new Error(`${bits.length} values, not ${n}`);
  return Float32Array.from(bits, DENSE[form].widen);
}

export { halfEven };
